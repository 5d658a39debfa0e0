"""Readers: what they have to do, and how to add one.

A reader is a module with one function:

    read(config, shards, plan, *, start, stop, rank=0, world_size=1) -> Iterator[Batch]

It yields this process's batches of the global steps start..stop-1, in order. For every step:

- `ids` are `plan.samples_of(step, rank, world_size)`. The order is the plan's, for any number of workers. A reader that
  starts at step i yields the same batches from there on as one that starts at step 0.
- `rows` are the samples whose pixels these are: `plan.read_valid` returns the planned sample, or a replacement if it is
  damaged. A photo that the decoder refuses is replaced in the same way, with the next `attempt`.
- `windows`, `view_points` and `color` are those of `pipeline.batch.draw_for(config, shards, passes, ids, rows)`,
  `passes` those of `plan.passes_of(step, rank, world_size)`.
- `views` are uint8 [B,Vg,H,W,3], one tensor for each size (`pipeline.batch.size_groups`), on the CPU or on a GPU: the
  decoded photo, cropped to the signed window, resized antialiased by `data.interpolation`, flipped if the window is
  (`worker.crop_resize`).
- `plan.prefetch` is called before the samples are read, so that remote shards are downloaded ahead.

It raises UserError if no valid sample is left, and RunError if the machine and not a photo is to blame. Worker processes
call `worker.init_worker`, and return a UserError as a value instead of raising it. Closing the iterator ends all of them.

tests/test_reader.py holds webdataset.py to this, tests/test_reader_dali.py dali.py. A new reader is chosen in
pipeline/loader.py.
"""
