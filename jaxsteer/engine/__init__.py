"""Rows of many requests decoded together: each with edits, settings and random numbers of its own."""

from jaxsteer.engine.engine import Busy, Engine, EngineOptions
from jaxsteer.engine.requests import Finished, Piece, Request, Scored, Ticket
from jaxsteer.engine.settings import check_served

__all__ = [
    "Busy",
    "Engine",
    "EngineOptions",
    "Finished",
    "Piece",
    "Request",
    "Scored",
    "Ticket",
    "check_served",
]
