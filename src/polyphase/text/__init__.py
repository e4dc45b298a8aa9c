"""Tokens to text and back: one tokenizer class, incremental detokenising, stop strings, grammars of structured output.

In come a model card's tokenizer file and the tokens of a growing sequence; out come token ids, text that will not change any more, and
the place where a stop string ends it. The engine and the frontend run the same classes on the same tokens, so that both stop at the same
character. Nothing here knows of a request, a process or a model's weights.
"""

from polyphase.text.detokenize import IncrementalDetokenizer
from polyphase.text.grammar import GrammarMatcher, GrammarVocabulary
from polyphase.text.stop import StopStringMatcher
from polyphase.text.tokenizer import Tokenizer

__all__ = ["GrammarMatcher", "GrammarVocabulary", "IncrementalDetokenizer", "StopStringMatcher", "Tokenizer"]
