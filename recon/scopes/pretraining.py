"""Training from random initialisation: how the bundled model was made, by the full-retraining path."""

from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from recon.data import TextSource, TokenData
from recon.scopes.full import FullRetraining

END = "<|endoftext|>"


class Pretraining(FullRetraining):
    """Next-token training of a new model, its byte-level BPE tokenizer trained on the same text.

    The weights are trained in fp32 and saved in bf16.

    Args:
        shape: The model's configuration, `model_type` and `vocab_size` included.
        epochs: Passes over the training sequences.
        lr: Peak learning rate of AdamW.
        weight_decay: AdamW's weight decay.
        betas: AdamW's averaging coefficients.
        warmup: Share of the steps with a rising learning rate; it falls linearly to zero afterwards.
    """

    def __init__(
        self,
        shape: dict[str, Any],
        epochs: int = 1,
        lr: float = 3e-3,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.95),
        warmup: float = 0.03,
    ) -> None:
        super().__init__(
            name="random",
            shape=shape,
            train="all",
            save_dtype="bfloat16",
            epochs=epochs,
            lr=lr,
            weight_decay=weight_decay,
            betas=betas,
            warmup=warmup,
        )

    def load(self, data: TokenData) -> None:
        """Make the model, and train a tokenizer of `shape.vocab_size` tokens on the train split."""
        self.model = self.source.model()
        self.dtype_to_save = self._dtype_to_save()
        data.tokenizer = train_tokenizer(data, self.model.config.get_text_config().vocab_size)


def train_tokenizer(data: TokenData, vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of `vocab_size` tokens, learned from the train split of `data`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    if not isinstance(data.source, TextSource):
        raise ValueError(
            f"a tokenizer is trained on documents, got {data.source}, which has none; choose a source of documents, "
            f"such as TextFiles"
        )
    texts = (row["text"] for row in data.source.documents("train"))  # pyright: ignore[reportArgumentType, reportCallIssue]
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, bos_token=END, pad_token=END)
