"""A server for programs that speak OpenAI's API: one thread writes for all its clients at once."""

from finchtune.inference.server.app import application
from finchtune.inference.server.worker import Served, Worker

__all__ = ["Served", "Worker", "application"]
