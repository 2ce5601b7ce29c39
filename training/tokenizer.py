"""Make the demo model's tokenizer: `python -m training.tokenizer`.

Byte-level BPE, so that any text can be written, over the wordings of the questions. Capitals and digits stay single
tokens: the model spells what it reads. The marks of the two roles are tokens of their own.
"""

from __future__ import annotations

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from vd_plugin.demo import MODEL_PATH
from vd_plugin.demo.questions import vocabulary

SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<pad>", "<image>")
ROLE_TOKENS = ("USER:", "ASSISTANT:")
VOCABULARY_SIZE = 512


def make_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[A-Z0-9]"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE - len(ROLE_TOKENS),
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(list(vocabulary()), trainer)
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in ROLE_TOKENS])
    assert tokenizer.get_vocab_size() <= VOCABULARY_SIZE
    return tokenizer


if __name__ == "__main__":
    make_tokenizer().save(str(MODEL_PATH / "tokenizer.json"))
