"""Texts that tokenizers may disagree on: sentences of many scripts, and random ones of every kind of character."""

SENTENCES = [
    "",
    " ",
    "a",
    "The quick brown fox jumps over the lazy dog.",
    "I'm sure they'll say it's what we've DON'T I'D HE'S you're THEY'RE 'tis 'S'T'RE",
    "It\u2019s not ASCII; '\u017f and '\u017fx, \u212a, '\u0130, 'LL, 'l\u017f",
    "In 2024, 1234567890 people paid $3.14159 (or \u20ac2,71828) at 12:34:56.",
    "def f(x):\n    if x > 0:\n\t\treturn x ** 2\r\n\n\n    return None  # done\n",
    "  leading, trailing  ",
    "\n\n\n a \n \n b\r\n\r\n c\t\td \u00a0e\u3000\u3000f \u2028\u2029 g\x0b\x0c\x1c\x85 h",
    "tabs\t\t\tand   many    spaces     here      .",
    "https://example.org/a/b?c=d&e=f#g user@example.org C:\\path\\to\\file",
    "Stra\u00dfe, \u00dcbergr\u00f6\u00dfe, na\u00efve fa\u00e7ade, \u0152uvre, \u00c5ngstr\u00f6m, \u0141\u00f3d"
    "\u017a",
    "e\u0301 a\u0308 A\u030a c\u0327\u0301 q\u0307\u0323 q\u0323\u0307 \u1e9b\u0323 \u0344 \u0958 \u2126 \u212b "
    "\ufb01",
    "\u1100\u1161\u11a8 \u1112\u1161\u11ab\u1100\u1173\u11af \ud55c\uad6d\uc5b4 \ub300\ud55c\ubbfc\uad6d",
    "\u4eca\u5929\u5929\u6c14\u5f88\u597d\uff0c\u6211\u4eec\u53bb\u516c\u56ed\u5427\u3002\u6570\u5b57\uff11\uff12"
    "\uff13\u3001\u4e00\u4e8c\u4e09",
    "\u6771\u4eac\u306f\u65e5\u672c\u306e\u9996\u90fd\u3067\u3059\u3002\u30c6\u30b9\u30c8\u30fb\u30c7\u30fc\u30bf"
    " \u304b\u3099\u306f\u309a",
    "\u0645\u0631\u062d\u0628\u0627 \u0628\u0627\u0644\u0639\u0627\u0644\u0645 \u0661\u0662\u0663 \u0628\u0650"
    "\u0633\u0652\u0645\u0650 \u0627\u0644\u0644\u0651\u064e\u0647\u0650",
    "\u05e9\u05b8\u05c1\u05dc\u05d5\u05b9\u05dd \u05e2\u05d5\u05dc\u05dd",
    "\u0928\u092e\u0938\u094d\u0924\u0947 \u0926\u0941\u0928\u093f\u092f\u093e \u0967\u0968\u0969 \u0915\u094d"
    "\u0937\u093f \u0b95\u0bbf \u0d15\u0d4d\u0d37",
    "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35\u0e0a\u0e32\u0e27\u0e42\u0e25\u0e01 \u0e51\u0e52\u0e53",
    "\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440! \u0401\u0436\u0438\u043a \u0438\u0306 \u0439 "
    "\u03b3\u03b5\u03b9\u03ac \u03c3\u03bf\u03c5 \u03ba\u03cc\u03c3\u03bc\u03b5 \u1f04\u0345",
    "\U0001f600 \U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 \U0001f44d\U0001f3fd \U0001f1e9"
    "\U0001f1ea\U0001f1eb\U0001f1f7 \u2764\ufe0f 1\ufe0f\u20e3",
    "\U0001d54c\U0001d55f\U0001d55a\U0001d554\U0001d560\U0001d555\U0001d556 \U0001d7cf\U0001d7d0\U0001d7d1 "
    "\U00020000\U0002a6d6 \U000e0041\U000f0000",
    "zero\u200bwidth\u200cand\u200djoin\ufeffbom \u202eright\u202c soft\u00adhyphen \ufffd \uffff \U0010ffff",
    "\x00\x01\x02\x07\x08\x1b\x7f\x80\x9f",
    "\u00bd \u00b2 \u2167 \u2460 \u3251 \u0bf0 \u1369 \U00010107 9\u0669\u06f9",
    "Mongolian \u180e separator \u1680 ogham \u2000\u2001\u200a spaces \u202f\u205f.",
    "Kirat \U00016d40\U00016d70 \U00011de0\U00011de9 a\U00016ff41",
    "\U00011f02\U00011f10 \U0001e4d0\U0001e4ec\U0001e4ef \U0002ebf0 \U00010d40\U00010d69 \U000105c0 \u1c89\ua7cb "
    "\U00016d40\U00016d70",
    "a\u0315\u0300\u05ae\u0062 a\u0300\u0315 \u0f71\u0f72\u0f74 \u0f74\u0f72\u0f71 a\u0345\u0897b a\u0345\u1df6b "
    "a\U00010f46\u0345",
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>",
    "<|im_start|>system\nYou are helpful.<|im_end|>\n<|im_start|>user\n<think>\n\n</think> Hi <|endoftext|>",
    "<s> [INST] <<SYS>> be brief <</SYS>> What? [/INST] Yes. </s><s>[INST] a [/INST]",
    "<s><s> <unk>x<unk></s>  <unk> y <0x41> <0x0A><0xFF>",
    "a word, words, sword wordy word-word _word word_ \u00e9word word\u0301 \u5b57word word\u24b6 word\u200d(word)",
    "<left> a   <left>b<left>   \u3000<left>  <right>  c <right>\n\n<right><left> <right> <left> x",
    "cafe\u0301 caf\u00e9 CAF\u00c9 xcaf\u00e9x cafe\u0301\u0301",
    "<|reserved_special_token_1|><|reserved_special_token_10|><|reserved_special_token_1|>0|> <|reserved_special_"
    "token_",
    "\u2581 \u2581\u2581a \u2581b\u2581",
    "\u0120hello \u010a \u0100 \u0143",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "----------======**********////////______!!!!!!!!??????......\u2014\u2014\u2026\u2026",
]

SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<s>",
           "</s>", "<unk>", "<think>", "</think>", "<left>", "<right>", "word", "words", "caf\u00e9", "cafe\u0301",
           "<0x41>", "<|reserved_special_token_1", "<|", "|>", "<"]
CONTRACTIONS = ["'s", "'t", "'re", "'ve", "'m", "'ll", "'d", "'S", "'T", "'RE", "'Ve", "'M",
                "'LL", "'D", "'\u017f", "'"]
SPACES = [" ", "  ", "    ", "\t", "\n", "\r\n", "\r", "\n\n", "\x0b", "\x0c", "\x1c", "\x85", "\u00a0", "\u1680",
          "\u180e", "\u2000", "\u2003", "\u200a", "\u200b", "\u2028", "\u2029", "\u202f", "\u205f", "\u3000", "\ufeff"]
BLOCKS = [(0x20, 0x7E), (0x20, 0x7E), (0x41, 0x7A), (0x30, 0x39), (0, 0x1F), (0x80, 0x24F), (0x250, 0x36F),
          (0x300, 0x36F), (0x370, 0x52F), (0x590, 0x6FF), (0x700, 0x8FF), (0x900, 0xDFF), (0xE00, 0xFFF),
          (0x1000, 0x1FFF),
          (0x1AB0, 0x1AFF), (0x1DC0, 0x1DFF), (0x2000, 0x206F), (0x2070, 0x2BFF), (0x20D0, 0x20FF), (0x3000, 0x30FF),
          (0x1100, 0x11FF), (0xAC00, 0xD7A3), (0x4E00, 0x9FFF), (0xA000, 0xABFF), (0xE000, 0xF8FF), (0xF900, 0xFAFF),
          (0xFB00, 0xFFFF), (0x10000, 0x10FFF), (0x11000, 0x11FFF), (0x12000, 0x16FFF), (0x1D100, 0x1D7FF),
          (0x1E000, 0x1EFFF), (0x1F000, 0x1FAFF), (0x20000, 0x323AF), (0xE0000, 0xE01EF), (0x10000, 0x10FFFF)]
MARKS = (list(range(0x300, 0x370)) + list(range(0x591, 0x5BE)) + list(range(0x64B, 0x660)) + list(range(0x898, 0x8A0))
         + list(range(0x1AB0, 0x1AF1)) + list(range(0x1DC0, 0x1E00)) + list(range(0x20D0, 0x20F1))
         + [0x93C, 0x94D, 0x9FE, 0xC3C, 0xF71, 0xF72, 0xF74, 0x1715, 0x3099, 0x309A, 0x10D24, 0x10F46, 0x11930, 0x11935,
            0x1E2EC, 0x1E4EC, 0x1E08F, 0x16FF0, 0x1D165, 0x1D16E])
WORDS = ("the of and to in is you that it he was for on are as with his they at be this have from or one had by word "
         "but not what all were we when your can said there use an each which she do how their if will up other about out "
         "many then them these so some her would make like him into time has look two more write go see number no way "
         "could people my than first water been call who oil its now find long down day did get come made may part"
         ).split()


def _character(rng):
    while True:
        c = rng.randint(*rng.choice(BLOCKS))
        if not 0xD800 <= c < 0xE000:
            return chr(c)


def _part(rng):
    kind = rng.randrange(12)
    if kind <= 2:
        return rng.choice(WORDS) + rng.choice(["", " ", ".", ", ", rng.choice(CONTRACTIONS)])
    if kind == 3:
        return rng.choice(SPACES) * rng.choice([1, 1, 2, 7])
    if kind == 4:
        return rng.choice(SPECIAL)
    if kind == 5:
        return str(rng.randrange(10 ** rng.randrange(1, 9)))
    if kind == 6:  # a base and marks in any order
        return _character(rng) + "".join(chr(rng.choice(MARKS)) for _ in range(rng.randrange(1, 5)))
    if kind == 7:
        return rng.choice(CONTRACTIONS) + rng.choice(["", "x", " "])
    if kind == 8:  # a run of one block
        low, high = rng.choice(BLOCKS)
        run = (rng.randint(low, high) for _ in range(rng.randrange(1, 8)))
        return "".join(chr(c) for c in run if not 0xD800 <= c < 0xE000)
    if kind == 9:
        return rng.choice(["\U0001f468\u200d\U0001f469\u200d\U0001f467", "\U0001f44d\U0001f3fd", "\u2764\ufe0f",
                           "\U0001f1e9\U0001f1ea", "\u1100\u1161\u11a8", "\uac00\u11a8", "\u2581", "\u0120", "\u010a"])
    if kind == 10:
        return chr(rng.choice([0xC0, 0xE9, 0x1E69, 0x212B, 0x958, 0xFB1D, 0x2ADC, 0xF900, 0x1D15E, 0xAC01]))
    return _character(rng)


def random_texts(rng, n):
    return ["".join(_part(rng) for _ in range(rng.randrange(1, 12))) for _ in range(n)]
