"""Votes of people as a reward: who is asked about which pictures, the votes file, and a model of the votes."""

from .ballots import Ballot, Likes, Pairs, Stars
from .choices import AtRandom, Choice, Disagreement
from .model import VoteModel
from .page import Page
from .record import Question, VoteRecord
from .voters import Replayed, Round, Simulated, VoteError, Voters
from .votes import Votes

__all__ = [
    "AtRandom",
    "Ballot",
    "Choice",
    "Disagreement",
    "Likes",
    "Page",
    "Pairs",
    "Question",
    "Replayed",
    "Round",
    "Simulated",
    "Stars",
    "VoteError",
    "VoteModel",
    "VoteRecord",
    "Voters",
    "Votes",
]
