"""All evaluations by name: what `opsin evaluate NAME` measures, and what a suite may list."""

from opsin.evaluate.copydetection import Copies, copies
from opsin.evaluate.depth import Depth, depth
from opsin.evaluate.discovery import Discovery, discovery
from opsin.evaluate.fairness import Fairness, fairness
from opsin.evaluate.finetune import Finetune, finetune
from opsin.evaluate.knn import Knn, knn
from opsin.evaluate.linear import Linear, linear
from opsin.evaluate.logreg import Logreg, logreg
from opsin.evaluate.retrieval import Retrieval, retrieval
from opsin.evaluate.robustness import Robustness, robustness
from opsin.evaluate.segmentation import Segmentation, segmentation
from opsin.evaluate.task import Task
from opsin.evaluate.video import Video, video

TASKS: dict[str, Task] = {
    "knn": Task(knn, Knn),
    "linear": Task(linear, Linear),
    "logreg": Task(logreg, Logreg),
    "finetune": Task(finetune, Finetune),
    "robustness": Task(robustness, Robustness),
    "segmentation": Task(segmentation, Segmentation),
    "depth": Task(depth, Depth),
    "retrieval": Task(retrieval, Retrieval),
    "copies": Task(copies, Copies),
    "discovery": Task(discovery, Discovery),
    "video": Task(video, Video),
    "fairness": Task(fairness, Fairness),
}
"""In the order of the paper's tables."""
