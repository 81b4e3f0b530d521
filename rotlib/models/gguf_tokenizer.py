"""A tokenizer as GGUF files say it: tokens, their types, merges, and the name of a cut.

llama.cpp knows byte-level BPE and nothing of a tokenizer's other settings: what of these matters is
refused before a file is written. Of a file that is read, the tokenizer is made from its keys, since
transformers leaves out the cut, and respells tokens with a space.
"""

import json
import tempfile

import gguf
from tokenizers import AddedToken, Regex, Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PLAIN, _SPLIT, _DIGITS = "ByteLevel, by its own rule", "ByteLevel", "Digits"
_WHOLE = "llama-bpe"  # a piece of text that is a token is that token, whatever the merges
# how a tokenizer cuts text before its merges, and llama.cpp's name for it
CUTS = {
    (_PLAIN,): "gpt-2",
    (_DIGITS, _PLAIN): "smollm",
    (_WORDS % r"\p{N}{1,3}", _SPLIT): _WHOLE,
    (_WORDS % r"\p{N}", _SPLIT): "qwen2",
}
# the types of the tokens that are found in text before it is cut, and whether they are special
_ADDED = {gguf.TokenType.CONTROL: True, gguf.TokenType.USER_DEFINED: False}


def cut_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """llama.cpp's name for the way a tokenizer cuts text before its merges.

    Raises ValueError where it has none that is known here, and where the tokenizer goes on
    otherwise than llama.cpp would.
    """
    refusal = (
        "this tokenizer isn't one that llama.cpp is known to share: "
        "export the model as 'fused', for llama.cpp's own converter"
    )
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise ValueError(refusal)
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    if (description["normalizer"] or {"type": "NFC"})["type"] != "NFC":  # which it leaves out
        raise ValueError(refusal)
    cut = description["pre_tokenizer"] or {"type": None}
    steps = cut["pretokenizers"] if cut["type"] == "Sequence" else [cut]
    found = CUTS.get(tuple(map(_step, steps)))
    model = description["model"]
    if found is None or model["type"] != "BPE" or model.get("byte_fallback"):
        raise ValueError(refusal)
    if (text := _read_otherwise(tokenizer.backend_tokenizer, description, found)) is not None:
        raise ValueError(
            f"this tokenizer makes other tokens of {text!r} than llama.cpp would of its "
            f"vocabulary and merges under the cut {found!r}: export the model as 'fused', for "
            "llama.cpp's own converter"
        )
    _check_ends(tokenizer)
    return found


def _check_ends(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ValueError where more is put around a text than the file's keys say: bos and eos."""
    text, whole = (tokenizer("a", add_special_tokens=ends).input_ids for ends in (False, True))
    bos, eos = [tokenizer.bos_token_id], [tokenizer.eos_token_id]
    if whole not in (text, bos + text, text + eos, bos + text + eos):
        around = tokenizer.convert_ids_to_tokens([each for each in whole if each not in text])
        raise ValueError(
            f"this tokenizer puts {' and '.join(map(repr, around))} around a text, and a GGUF file "
            "knows of one bos_token before it and one eos_token behind it: export the model as "
            "'fused', for llama.cpp's own converter"
        )


def _step(step: dict) -> str:
    if step["type"] == "Split":
        return step["pattern"].get("Regex", "")
    if step["type"] == "ByteLevel" and not step["add_prefix_space"]:
        return _PLAIN if step["use_regex"] else _SPLIT
    if step["type"] == "Digits" and step["individual_digits"]:
        return _DIGITS
    return f"{step['type']}, otherwise"


def _read_otherwise(backend: Tokenizer, description: dict, cut: str) -> str | None:
    """The first text of which a file of its vocabulary, merges and added tokens makes others.

    Tried are all tokens, each as a text of its own, and the added ones amid others.
    """
    added, merges = description["added_tokens"], description["model"]["merges"]
    tokens = description["model"]["vocab"] | {token["content"]: token["id"] for token in added}
    backend = Tokenizer.from_str(backend.to_str())
    backend.no_truncation()  # as transformers calls it
    backend.no_padding()
    bare = Tokenizer(BPE(tokens, [*map(tuple, merges)], ignore_merges=cut == _WHOLE))
    bare.normalizer, bare.pre_tokenizer = backend.normalizer, backend.pre_tokenizer
    _add(bare, {token["content"]: token["special"] for token in added})
    texts = [backend.decode([number], skip_special_tokens=False) for number in tokens.values()]
    texts += [f"a {token['content']} b{token['content']}c" for token in added]
    ours, theirs = (
        [found.ids for found in one.encode_batch(texts, add_special_tokens=False)]
        for one in (backend, bare)
    )
    of_both = zip(texts, ours, theirs, strict=True)
    return next((text for text, mine, other in of_both if mine != other), None)


def _add(backend: Tokenizer, tokens: dict[str, bool]) -> None:
    """Let tokens, special ones or not, be found in text before it is cut."""
    for special, add in ((True, backend.add_special_tokens), (False, backend.add_tokens)):
        alike = [token for token, is_special in tokens.items() if is_special == special]
        add([AddedToken(token, normalized=False, special=special) for token in alike])


def write_tokenizer(
    writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase, size: int, cut: str
) -> None:
    """The keys of a tokenizer with this cut, of a model with `size` tokens."""
    known = {number: token for token, number in tokenizer.get_vocab().items()}
    kind_of = {special: kind for kind, special in _ADDED.items()}
    added = tokenizer.added_tokens_decoder
    tokens, kinds = [], []
    for number in range(size):
        tokens.append(known.get(number, f"[unused {number}]"))
        if number in added:
            kinds.append(kind_of[added[number].special])
        else:
            kinds.append(gguf.TokenType.NORMAL if number in known else gguf.TokenType.UNUSED)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(cut)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        vocabulary = gguf.SpecialVocab(folder, load_merges=True, n_vocab=len(tokens))
        vocabulary.add_to_gguf(writer, quiet=True)


def tokenizer_of(keys: dict, cut: str, read: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer that a file's keys describe; `read` is what transformers makes of them.

    It is of a class that doesn't bring a cut of its own when it is read.
    """
    tokens, kinds = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in keys["tokenizer.ggml.merges"]]
    numbers = {token: number for number, token in enumerate(tokens)}
    nothing = {"continuing_subword_prefix": "", "end_of_word_suffix": ""}
    backend = Tokenizer(BPE(numbers, merges, ignore_merges=cut == _WHOLE, **nothing))
    backend.normalizer = read.backend_tokenizer.normalizer
    backend.post_processor = read.backend_tokenizer.post_processor
    backend.decoder = read.backend_tokenizer.decoder
    backend.pre_tokenizer = pre_tokenizer_of(cut)
    of_kind = zip(tokens, kinds, strict=True)
    _add(backend, {token: _ADDED[kind] for token, kind in of_kind if kind in _ADDED})
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, chat_template=read.chat_template, **read.special_tokens_map
    )


def pre_tokenizer_of(cut: str) -> pre_tokenizers.PreTokenizer:
    """What cuts text as llama.cpp does under that name."""
    made = {
        _PLAIN: pre_tokenizers.ByteLevel(add_prefix_space=False),
        _SPLIT: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        _DIGITS: pre_tokenizers.Digits(individual_digits=True),
    }
    steps = next(steps for steps, name in CUTS.items() if name == cut)
    return pre_tokenizers.Sequence(
        [made.get(step) or pre_tokenizers.Split(Regex(step), "isolated") for step in steps]
    )


def check_vocabulary(keys: dict, rows: int | None) -> None:
    """Raises ValueError for keys that say no tokenizer, or more tokens than the embedding's rows.

    So it does for tokens that aren't distinct words, and for ids and marks that are none.
    """
    for name in ("tokens", "merges", "token_type"):
        if not keys.get(f"tokenizer.ggml.{name}"):
            raise ValueError(f"its key tokenizer.ggml.{name} is missing: download the file again")
    tokens, kinds = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
    faults = {
        "tokens": not _all(str, tokens) or len({*tokens}) < len(tokens),
        "token_type": not _all(int, kinds)
        or len(kinds) != len(tokens)
        or not {*kinds} <= {*gguf.TokenType},
        "merges": not _all(str, merges := keys["tokenizer.ggml.merges"])
        or any(merge.count(" ") != 1 for merge in merges),
    }
    for name in ("bos", "eos", "padding", "unknown"):
        number = keys.get(f"tokenizer.ggml.{name}_token_id", 0)
        faults[f"{name}_token_id"] = not _all(int, [number]) or not 0 <= number < len(tokens)
    for name in ("bos", "eos"):
        faults[f"add_{name}_token"] = not isinstance(
            keys.get(f"tokenizer.ggml.add_{name}_token", False), bool
        )
    if wrong := [name for name, fault in faults.items() if fault]:
        raise ValueError(
            f"its key tokenizer.ggml.{wrong[0]} doesn't hold what belongs there (distinct tokens, "
            "as many types, merges of two, the ids of some, yes or no): download the file again"
        )
    if rows is not None and len(tokens) > rows:
        raise ValueError(
            f"it names {len(tokens)} tokens, and its embedding has {rows} rows: "
            "download the file again"
        )


def _all(kind: type, values: object) -> bool:
    return isinstance(values, list) and all(type(value) is kind for value in values)
