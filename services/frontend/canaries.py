"""Texts on which two tokenizers that are not the same show it: scripts, spacing, digits, joints, special tokens.

``canaries`` is for every start of a frontend, so it is small; ``random_texts`` goes on for as long as somebody asks.
The same seed gives the same texts.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

_SAMPLES = (
    "",
    " ",
    "a",
    "Hello, world!",
    "The quick brown fox jumps over 13 lazy dogs; it's 2026-11-22, 07:45:12.5 (UTC+02:00).",
    "I'll we've they'd you're it's CAN'T Don't 'sup ''tis rock'n'roll",
    "  leading, trailing  and   inner    spaces \t tabs\t\tand\nlines\n\n\nand \r\n returns \r \u00a0 \u3000 wide ",
    "1 12 123 1234 12345 1234567890 3.14159 1,000,000 0x1F 1e-9 ½ ² ٣٤٥ ४५६ Ⅷ ①",
    "snake_case CamelCase kebab-case SCREAMING_CASE __dunder__ a.b.c path/to/file.txt https://example.org/?q=1&r=%20#x",
    "def f(x: int) -> str:\n    if x != 0:\n        return f'{x!r:>10}'\n\treturn None  # comment\n",
    '{"key": [1, 2.5e3, null, true], "text": "line\\nbreak \\u00e9"}',
    "<div class=\"a\">&amp;&nbsp;</div> <!-- x --> SELECT * FROM t WHERE a >= 'b';",
    "$E = mc^2$ ∑_{i=0}^{n} √x ≠ ∞ ∂f/∂x → ⇒ ∀∃ ∈ ℝ ± × ÷ ≤ ≥",
    "naïve café Ångström œuvre Straße ÇA İstanbul ıŞĞ ñandú żółć Příliš žluťoučký kůň",
    "e\u0301 a\u0308 o\u0302\u0323 \u1112\u1161\u11ab ﬁ ﬀ ｆｕｌｌｗｉｄｔｈ ㎏ ™ ® ©",
    "Съешь же ещё этих мягких французских булок. Ξεσκεπάζω την ψυχοφθόρα βδελυγμία.",
    "我能吞下玻璃而不伤身体。我能吞下玻璃、而不傷身體？「」『』【】　日本語ﾃｷｽﾄ ひらがなカタカナ々〆",
    "나는 유리를 먹을 수 있어요. 그래도 아프지 않아요",
    "أنا قادر على أكل الزجاج و هذا لا يؤلمني. אני יכול לאכול זכוכית \u200f\u200e mixed 12 rtl",
    "मैं काँच खा सकता हूँ และฉันกินกระจกได้ ကျွန်တော် ཤེལ་སྒོ་ ជំរាបសួរ",
    "😀 😀😀 👍🏽 👨‍👩‍👧‍👦 🏳️‍🌈 🇪🇺🇺🇳 ❤️ ☺ 🧑🏿‍🚀 1️⃣ \U0001f9ff",
    "\x00\x01\x07\x08\x0b\x0c\x1b[31m\x7f \u0085 \u2028 \u2029 \ufeff \ufffd \u200b \u200d \ue000 \U000f0000",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "." * 70 + " " * 70 + "=" * 70 + "\n" * 70 + "-*" * 35 + "!?" * 35,
    "supercalifragilisticexpialidocious pneumonoultramicroscopicsilicovolcanoconiosis Donaudampfschifffahrt",
    "asdkjfhqwpeoiruzxmcnvb QWERTZUIOP zxqj vbkw",
    "<|not_a_token|> < |im_start| > <|im_start <s></s> [INST] <<SYS>> <unk> <pad> [MASK]",
)

_ALPHABETS = (
    "abcdefghijklmnopqrstuvwxyz",
    "ABCDEFGHIJKLMNOPQRSTUVWXYZ",
    "0123456789",
    " \t\n\r\u00a0",
    "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~",
    "àâäçéèêëîïôöùûüÿñßœæøåłżźćńšžěščřž",
    "абвгдежзийклмнопрстуфхцчшщъыьэюя",
    "αβγδεζηθικλμνξοπρστυφχψω",
    "的一是不了人我在有他这为之大来以个中上们",
    "のにはをたがでてとしれさあいうえおカキクケコ",
    "가나다라마바사아자차카타파하",
    "ابتثجحخدذرزسشصضطظعغفقكلمنهوي",
    "अआइईउऊएऐओऔकखगघङचछजझञ़्ािी",
    "😀😁😂🤣😃👍🏽👩‍🚀🇪🇺❤️",
    "\u0301\u0308\u0327\u200b\u200d\ufeff\u2028\ufffd\x00\x1b\x7f",
)
_JOINTS = ("", "", " ", " ", "  ", "\n", "\n\n", "\t", "'s", "'ll", "n't", ".", ", ", "-", "_", "...")


def canaries(special_tokens: Sequence[str]) -> list[str]:
    """A few hundred texts, each of ``special_tokens`` in several surroundings among them."""
    texts = list(_SAMPLES)
    texts += [first + second for first, second in zip(_SAMPLES, _SAMPLES[7:], strict=False)]
    for token in special_tokens:
        texts += [token, f" {token} ", f"a{token}b", token + token, f"\n{token}\n\n", token[:-1], f"{token}1 {token}é"]
    if special_tokens:
        texts.append("".join(token + sample for token, sample in zip(special_tokens, _SAMPLES, strict=False)))
    texts.append(" ".join(_SAMPLES))
    stream = random_texts(special_tokens, seed=0)
    return texts + [next(stream) for _ in range(200)]


def random_texts(special_tokens: Sequence[str], *, seed: int) -> Iterator[str]:
    """Without end. Mostly short: what tokenizers stumble over are joints."""
    rng = random.Random(seed)
    while True:
        parts = []
        for _ in range(rng.choice((1, 2, 3, 5, 8, 20))):
            parts += [_piece(special_tokens, rng), rng.choice(_JOINTS)]
        yield "".join(parts)


def _piece(special_tokens: Sequence[str], rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.05 and special_tokens:
        token = rng.choice(special_tokens)
        return token if rng.random() < 0.8 else token[: rng.randrange(len(token))]
    if kind < 0.30:
        sample = rng.choice(_SAMPLES)
        start = rng.randrange(len(sample) + 1)
        return sample[start : start + rng.randint(0, 30)]
    if kind < 0.35:  # any character there is, but for halves of surrogate pairs
        points = (rng.randrange(0x11_0000) for _ in range(rng.randint(1, 6)))
        return "".join(chr(point) for point in points if not 0xD800 <= point < 0xE000)
    alphabet = rng.choice(_ALPHABETS)
    return "".join(rng.choices(alphabet, k=rng.randint(1, 12)))
