"""Built-in rewards. Importing them is cheap: networks and extras are imported when a reward is built."""

from .caching import Cached
from .clip_based import Aesthetic, CLIPScore, PickScore
from .combine import WeightedSum
from .compressibility import JPEGCompressibility
from .concurrent import Concurrent
from .geneval import GenEval
from .group_rank import GroupRank
from .hps import HPSv2
from .hpsv3 import HPSv3
from .hpsv3_plus_plus import HPSv3PlusPlus, IterationRamp
from .image_reward import ImageReward
from .judge import Judge
from .liking import BinaryLiking
from .limits import Clipped
from .memory import HalvedBatches
from .ocr import OCR
from .remote import RemoteReward
from .worker import WorkerReward

__all__ = [
    "OCR",
    "Aesthetic",
    "BinaryLiking",
    "CLIPScore",
    "Cached",
    "Clipped",
    "Concurrent",
    "GenEval",
    "GroupRank",
    "HPSv2",
    "HPSv3",
    "HPSv3PlusPlus",
    "HalvedBatches",
    "ImageReward",
    "IterationRamp",
    "JPEGCompressibility",
    "Judge",
    "PickScore",
    "RemoteReward",
    "WeightedSum",
    "WorkerReward",
]
