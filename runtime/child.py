"""A process that another one has started, and that ends with it."""

import multiprocessing
import os
import threading
import time


def end_with_parent(parent: int | None = None) -> None:
    """End this process when its parent has ended, however that ended.

    parent: its process id, for a program of its own; without it, this is a process of `multiprocessing`.
    """
    process = multiprocessing.parent_process()
    assert process is not None or parent is not None

    def watch() -> None:
        if parent is None and process is not None:
            process.join()
        while parent is not None and os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, name="end with the parent", daemon=True).start()
