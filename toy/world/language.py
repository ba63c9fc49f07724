"""The words of the toy world in one place: captions, referring expressions, implicit queries and dialogues."""

from toy.world.expressions import POSITIONAL, Expression, expressions
from toy.world.knowledge import Implicit, implicit
from toy.world.talk import captions, dialogues

__all__ = ["POSITIONAL", "Expression", "Implicit", "captions", "dialogues", "expressions", "implicit"]
