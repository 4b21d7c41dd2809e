"""Grammar-constrained output: which token ids may come next so that the text fits a JSON schema, regex or choice.

Owns the compiled grammars and their cost bounds. Never sees logits: it fills bit masks that the sampler applies.
The automaton is llguidance's: it works lazily under fuel limits, so a hostile schema costs bounded time."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from engine.compute.masks import GrammarError
from engine.step import Int32


@dataclass(frozen=True, slots=True)
class GrammarLimits:
    """Bounds on what one client's grammar may cost."""

    source_bytes_max: int = 64 * 1024  # Claude Code's 27 tool schemas together are about 60 kB
    grammar_size_max: int = 100_000  # symbols
    compile_fuel: int = 1_000_000  # about 20 ms
    step_fuel: int = 200_000  # lexer work, about 15 ms: with the items the worst that one token's mask may take
    step_items_max: int = 50_000  # parser work, about 3 ms
    cached_grammars_max: int = 64


class GrammarCompiler:
    """Compiles grammars for one tokenizer. A grammar seen before is copied from the cache."""

    def __init__(
        self,
        tokenizer_json: str,
        vocab_size: int,
        eos_ids: Sequence[int],
        limits: GrammarLimits = GrammarLimits(),
    ) -> None:
        self._tokenizer = LLTokenizer(tokenizer_json, n_vocab=vocab_size, eos_token=list(eos_ids))
        self._limits = limits
        self._parser_limits = LLParserLimits(
            max_grammar_size=limits.grammar_size_max,
            initial_lexer_fuel=limits.compile_fuel,
            step_lexer_fuel=limits.step_fuel,
            step_max_items=limits.step_items_max,
            verbose_errors=False,  # its verbose errors quote the schema
        )
        self._cache: OrderedDict[tuple[str, str], LLMatcher] = OrderedDict()
        self.mask_words = -(-vocab_size // 32)

    def compile(self, kind: str, source: str) -> Grammar:
        """A grammar at its start. `kind`: json_schema | regex | lark. Raises GrammarError."""
        if len(source) > self._limits.source_bytes_max:
            raise GrammarError(f"the {kind} is larger than {self._limits.source_bytes_max} bytes")
        known = self._cache.get((kind, source))
        if known is None:
            known = self._compile(kind, source)
            self._cache[kind, source] = known
            if len(self._cache) > self._limits.cached_grammars_max:
                self._cache.popitem(last=False)
        self._cache.move_to_end((kind, source))
        return Grammar(known.deep_copy(), self.mask_words)

    def _compile(self, kind: str, source: str) -> LLMatcher:
        try:
            grammar = _GRAMMARS[kind](source)
        except KeyError:
            raise GrammarError(f"unknown kind of grammar; there are {', '.join(_GRAMMARS)}") from None
        except (ValueError, RecursionError):
            raise GrammarError(f"the {kind} cannot be read") from None
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=self._parser_limits)
        if matcher.is_error():
            raise GrammarError(f"the {kind} cannot be compiled: {matcher.get_error().splitlines()[0][:200]}")
        return matcher


def _json_schema(source: str) -> str:
    """Between JSON's parts a newline and an indent, no more: a small model else fills its answer with them."""
    return LLMatcher.grammar_from_json_schema(source, defaults={"whitespace_pattern": r"\n? {0,16}"})


_GRAMMARS: dict[str, Callable[[str], str]] = {
    "json_schema": _json_schema,
    "regex": LLMatcher.grammar_from_regex,
    "lark": LLMatcher.grammar_from_lark,
}


class Grammar:
    """Where one sequence stands in its grammar."""

    def __init__(self, matcher: LLMatcher, mask_words: int) -> None:
        self._matcher = matcher
        self.mask_words = mask_words

    def fill(self, mask: Int32) -> None:
        """Set the bits of the ids that may come next: `mask` is int32 [mask_words], bit i of word i // 32.

        Raises GrammarError when the grammar outran its fuel; that sequence alone fails."""
        assert mask.shape == (self.mask_words,)
        assert mask.flags.c_contiguous
        self._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        self._raise_error()

    def accept(self, token: int) -> None:
        """Step over a token that the mask allowed. Raises GrammarError on one that it did not."""
        self._matcher.consume_token(token)
        self._raise_error()

    def _raise_error(self) -> None:
        if self._matcher.is_error():
            raise GrammarError(self._matcher.get_error().splitlines()[0][:200])
