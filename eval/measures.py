"""The measures of `compare`: each protocol with its published settings, as entries of measures.json."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from eval import cluster_seg, linear, linear_seg, points, retrieval_seg
from eval.datasets import VocSegmentation, scene_sizes, voc_splits
from eval.features import default_workers
from eval.knn import photo_knn
from eval.target import EvalSpec
from model.backbone import Backbone
from model.vit import ViT

FEW = 128  # one in this many train scenes: if all are labeled, nearest raw pixels may already do well (docs/results.md)

Measures = dict[str, Any]

NEEDS_VIT = {"points": "a ResNet has no reference tokens"}  # measure: why it cannot be taken of another network


def measure_knn(network: Backbone, spec: EvalSpec) -> Measures:
    photos = spec.source.photos(spec.size or network.image_size, spec.train, spec.val, spec.limit)
    assert photos is not None  # compare takes only measures that the data allows
    train, val = photos
    vote: dict[str, Any] = dict(k=spec.source.settings.k, temperature=spec.source.settings.temperature)
    workers = default_workers(len(train), spec.workers)
    top = photo_knn(network, train, val, ("cls", "patches"), **vote, workers=workers, progress=True)
    return {"knn_top1": top["cls"][0], "knn_top1_patches": top["patches"][0]}


def measure_linear(network: Backbone, spec: EvalSpec) -> Measures:
    photos = spec.source.photos(spec.size or network.image_size, spec.train, spec.val, spec.limit)
    assert photos is not None
    protocol = linear.Protocol.for_views(network.image_size)
    workers = default_workers(len(photos[0]) * protocol.reads, spec.workers)
    best = linear.best_of(linear.fit(network, *photos, protocol, workers=workers, progress=True))
    return {"linear_top1": best.top1, "linear_features": best.features, "linear_rate": best.rate}


def measure_linear_seg(network: Backbone, spec: EvalSpec) -> Measures:
    assert spec.data is not None
    settings = spec.source.settings
    protocol = linear_seg.Protocol.for_views(network.image_size, spec.size)
    protocol = replace(protocol, epochs=settings.seg_epochs, lr=settings.seg_lr)
    train, val = linear_seg.scenes_of(spec.data, protocol, None, "val", palette=spec.palette)
    workers = default_workers(len(train) * protocol.reads, spec.workers)
    history = linear_seg.fit(network, train, val, protocol, workers=workers, progress=True)
    last, best = history[-1], linear_seg.best_of(history)
    measures = {"linear_seg_miou": last.miou, "linear_seg_miou_best": best.miou}
    return measures | {"linear_seg_miou_present": last.miou_present, "linear_seg_iou": last.iou}


def measure_cluster_seg(network: Backbone, spec: EvalSpec) -> Measures:
    assert spec.data is not None
    size, map_size = scene_sizes(network.image_size, spec.size)
    scenes = VocSegmentation(spec.data, "val", size, palette=spec.palette)
    options: dict[str, Any] = dict(seeds=spec.seeds, workers=default_workers(len(scenes), spec.workers))
    many, few = cluster_seg.measure(network, scenes, map_size, [500, scenes.classes], **options, progress=True)
    measures = {"cluster_seg_miou_500": many.miou, "cluster_seg_miou": few.miou}
    return measures | {"spread": {"cluster_seg_miou_500": many.spread, "cluster_seg_miou": few.spread}}


def measure_retrieval_seg(network: Backbone, spec: EvalSpec) -> Measures:
    assert spec.data is not None
    train, val = voc_splits(spec.data, scene_sizes(network.image_size, spec.size)[0], palette=spec.palette)
    score = retrieval_seg.measure(network, train, val, workers=default_workers(len(train), spec.workers), progress=True)
    few = train.subset(max(1, len(train) // FEW))
    from_few = retrieval_seg.measure(network, few, val, workers=default_workers(len(val), spec.workers), progress=True)
    measures = {"retrieval_seg_miou": score.miou, "retrieval_seg_miou_present": score.miou_present}
    measures |= {"retrieval_seg_miou_few": from_few.miou, "retrieval_seg_few": len(few)}
    return measures | {"retrieval_seg_iou": score.iou}


def measure_points(network: Backbone, spec: EvalSpec) -> Measures:
    assert spec.data is not None
    assert isinstance(network, ViT)
    train, val = voc_splits(spec.data, scene_sizes(network.image_size, spec.size)[0], palette=spec.palette)
    score = points.measure(network, train, val, workers=default_workers(len(train), spec.workers), progress=True)
    measures = {f"points_{kind}_{on}": score.knn[on][kind] for on in score.knn for kind in points.KINDS}
    measures |= {f"points_{kind}_{on}_linear": score.linear[on][kind] for on in score.linear for kind in points.KINDS}
    names = ("within", "cosine", "distance", "entropy")
    return measures | {f"points_{name}": getattr(score, name) for name in names}


MEASURES: dict[str, Callable[[Backbone, EvalSpec], Measures]] = {
    "knn": measure_knn,
    "linear": measure_linear,
    "linear_seg": measure_linear_seg,
    "cluster_seg": measure_cluster_seg,
    "retrieval_seg": measure_retrieval_seg,
    "points": measure_points,
}
