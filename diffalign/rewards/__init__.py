"""Built-in rewards. Importing them is cheap: networks and extras are imported when a reward is built."""

from .caching import Cached
from .clip_based import Aesthetic, CLIPScore, PickScore
from .combine import WeightedSum
from .compressibility import JPEGCompressibility
from .concurrent import Concurrent
from .geneval import GenEval
from .hps import HPSv2
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
    "HPSv2",
    "HalvedBatches",
    "ImageReward",
    "JPEGCompressibility",
    "Judge",
    "PickScore",
    "RemoteReward",
    "WeightedSum",
    "WorkerReward",
]
