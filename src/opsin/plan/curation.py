"""`opsin plan curation`: what curating a heap of images would take, on paper.

The steps of the paper's pipeline (§3, Appendix A): read and decode, embed, find near-duplicates among all, retrieve for
the queries, cluster. Nothing here was run at such a size: every rate is an option or follows from the GPU.
"""

from dataclasses import dataclass

from opsin.backbone.registry import architecture
from opsin.errors import OpsinError
from opsin.plan.devices import DATA_SHEETS, find
from opsin.plan.options import Cluster, Rates
from opsin.plan.speed import Range, forward_time

PAPER = "1.3 billion images: under 2 days on 160 V100-32GB, with Faiss on GPUs (Appendix A.4)"
KEPT = 744e6 / 1.3e9
"""Of the images, what both de-duplications leave in the paper (Appendix A.3): what retrieval and clusters work on."""
NEIGHBOURS = 64
"""Of an image, among which duplicates are looked for (Appendix A.3)."""


@dataclass(frozen=True)
class CurationPlan:
    """What `opsin plan curation` finds."""

    verdict: str
    """One sentence."""
    images: float
    """Of the heap."""
    hours: dict[str, Range]
    """By step; reading, decoding and embedding go on side by side."""
    total_hours: Range
    """The slowest of the first three, and the others one after the other."""
    bytes: dict[str, float]
    """That each result needs on disk."""
    paper: str
    """What the paper says of its own run."""
    assumptions: list[str]
    """What the numbers rest on."""


def plan_curation(images: float, gpu: str, cluster: Cluster, rates: Rates) -> CurationPlan:
    """Work out on paper what curating `images` needs, with embeddings and searches in half precision.

    Raises:
        OpsinError: an unknown GPU or backbone, or numbers that do not fit.
    """
    if not 1 <= images < float("inf"):
        raise OpsinError(f"--images is {images:g}: give 1 or more.")
    arch = architecture(rates.backbone)
    if rates.size % arch.patch:
        nearest = max(1, round(rates.size / arch.patch)) * arch.patch
        raise OpsinError(f"--size {rates.size} is not a multiple of the patch {arch.patch}: try {nearest}.")
    sheet = DATA_SHEETS.get(gpu.lower())
    precision = "bf16" if sheet is None or sheet.bf16 else "fp16"
    device, gpus = find(gpu, precision), cluster.gpus
    machines = -(-gpus // cluster.node)
    flops, seconds = forward_time(arch, rates.size, precision, device)

    def searched(queries: float, among: float) -> Range:
        """Hours to compare queries with all lists' centres, and with the vectors of some lists."""
        compared = rates.lists + among * rates.probes / rates.lists
        return _once(queries * compared * 2 * arch.width / (rates.scan * device.product * gpus) / 3600)

    kept = images * KEPT
    assigned = 2.0 * rates.iterations * kept * rates.clusters * arch.width
    hours = {
        "read": _once(images * rates.kilobytes * 1e3 / (rates.read * 1e9 * machines) / 3600),
        "decode": _once(images / (rates.decode * rates.cores * gpus) / 3600),
        "embed": seconds.map(lambda each: images * each / gpus / 3600),
        "near-duplicates": searched(images, images),
        "retrieve": searched(rates.queries, kept),
        "k-means": _once(assigned / (rates.scan * device.product * gpus) / 3600),
    }
    side_by_side = [hours[name] for name in ("read", "decode", "embed")]
    after = [hours[name] for name in ("near-duplicates", "retrieve", "k-means")]
    total = Range(*(max(step[end] for step in side_by_side) + sum(step[end] for step in after) for end in (0, 1)))
    slowest = max(hours, key=lambda name: hours[name].slow)
    where = f"{gpus} × {device.name}" if gpus > 1 else device.name
    return CurationPlan(
        verdict=f"{images:,.0f} images on {where}: {total.slow:,.1f} hours on paper, and more in practice; most of "
        f"them to {_VERBS.get(slowest, slowest)}.",
        images=images,
        hours=hours,
        total_hours=total,
        bytes={
            "files": images * rates.kilobytes * 1e3,
            "embeddings in half precision": images * arch.width * 2,
            "neighbours and similarities": images * NEIGHBOURS * (8 + 2),
            "paths, hashes, clusters": images * 128,
        },
        paper=PAPER,
        assumptions=[
            f"device: {device.source}",
            f"one embedding serves duplicates, retrieval and clusters: {rates.backbone} at {rates.size} pixels, "
            f"{flops / 1e9:.0f} GFLOP an image, {arch.width} numbers",
            f"assumed rates: {rates.decode:g} images/s decoded by each of {rates.cores} cores for each GPU, "
            f"{rates.read:g} GB/s read by each of {machines} machine{'s' * (machines > 1)}, files of "
            f"{rates.kilobytes:g} kB",
            f"search: {rates.lists:,} inverted lists of whole vectors, {rates.probes} visited, at {rates.scan:.0%} of "
            f"a large product's speed (assumed); {NEIGHBOURS} neighbours; vectors are spread over the GPUs, "
            f"{images * arch.width * 2 / gpus / 1e9:,.1f} GB on each",
            f"{KEPT:.0%} are left after both de-duplications, as in the paper; k-means: {rates.clusters:,} clusters, "
            f"{rates.iterations} iterations over all that is left",
            "left out: downloads, safety filters, blurring of faces, perceptual hashes, connected components (on a "
            "processor), and training an index",
            "committed measurements: 32 images/s per core on a two-core machine for decoding with ten crops, which is "
            "more work than this",
        ],
    )


_VERBS = {"near-duplicates": "find near-duplicates", "k-means": "cluster"}


def _once(hours: float) -> Range:
    return Range(hours, hours)
