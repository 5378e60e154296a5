"""What depends on the batch alone is at hand in every stage: two processes compute what one does."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.demos.transformer import LightningTransformer, Transformer
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.data import DataLoader, TensorDataset

from lightning_sg import Boundary, SyntheticGradients, SyntheticGradientStrategy, TrueGradient
from tests.models import assert_same_state, make_trainer, state_of
from tests.ranks import run_ranks

TOKENS, LONG, WIDTH = 7, 5, 8


def sequences() -> DataLoader[Any]:
    """Tokens, their lengths, which differ from batch to batch, and what comes next."""
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, TOKENS, (40, LONG), generator=draw)
    lengths = torch.randint(1, LONG + 1, (40,), generator=draw)
    return DataLoader(TensorDataset(tokens, lengths, (tokens + lengths[:, None]) % TOKENS), batch_size=8)


def masks(lengths: Tensor) -> Tensor:
    return torch.arange(LONG, device=lengths.device) < lengths[:, None]


class Sequences(pl.LightningModule):
    """Two stages on sequences; the last has a linear layer to the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.cut, self.last = nn.Embedding(TOKENS, WIDTH), Boundary(), nn.Linear(WIDTH, TOKENS)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        raise NotImplementedError

    def loss(self, batch: Any) -> Tensor:
        tokens, lengths, targets = batch
        mask = masks(lengths)
        return F.cross_entropy(self(tokens, lengths)[mask], targets[mask])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


class Encoder(nn.Module):
    """An LSTM on packed sequences; as a module of its own, other processes may remember what it returns."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(WIDTH, WIDTH, batch_first=True)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        return pad_packed_sequence(self.rnn(packed)[0], batch_first=True, total_length=LONG)[0]


class Packed(Sequences):
    """Packs before the boundary and behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.behind = Encoder(), Encoder()

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        x = self.before(self.embedding(tokens), lengths)
        return self.last(self.behind(self.cut(x), lengths))


class PackedThrough(Sequences):
    """What crosses is packed; its batch sizes come from the lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.behind = (nn.GRU(WIDTH, WIDTH, batch_first=True) for _ in range(2))

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        x = self.embedding(tokens)
        packed, _ = self.before(pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False))
        packed, _ = self.behind(packed._replace(data=self.cut(packed.data)))
        return self.last(pad_packed_sequence(packed, batch_first=True, total_length=LONG)[0])


class Shorter(nn.Module):
    """Returns what is as long as the longest sequence of the batch, and reads its length."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        return self.layer(x[:, : int(lengths.max())])


class Chosen(Sequences):
    """The number of rows that cross depends on values of the batch, in many ways."""

    def __init__(self) -> None:
        super().__init__()
        self.shorter, self.middle = Shorter(), nn.Linear(WIDTH, WIDTH)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        x = self.shorter(self.embedding(tokens), lengths)
        mask = masks(lengths)[:, : x.size(1)]
        places = mask.nonzero()
        rows = torch.cat([x[mask], x[places[:, 0], places[:, 1]], x.masked_select(mask[..., None]).view(-1, WIDTH)])
        rows = rows + self.embedding(tokens.unique()).mean(0)
        first = x[:, 0].repeat_interleave(lengths, dim=0)
        one, two, three, first = torch.relu(self.middle(self.cut(torch.cat([rows, first])))).chunk(4)
        result = one.new_zeros(*tokens.shape, TOKENS)
        result[mask.nonzero(as_tuple=True)] = self.last(one + two + three + first)
        return result


class Masked(Sequences):
    """A causal mask, positions and one-hot targets, made before the boundary and used behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (
            nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.0, batch_first=True) for _ in range(2)
        )
        self.positions: Tensor | None = None

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        x = self.embedding(tokens)
        if self.positions is None:
            self.positions = torch.sin(torch.arange(LONG, device=x.device)[:, None] * torch.linspace(0.1, 1, WIDTH))
        causal = nn.Transformer.generate_square_subsequent_mask(x.size(1), device=x.device, dtype=x.dtype)
        padding = ~masks(lengths)
        before = F.one_hot(tokens, WIDTH).type_as(x)
        like = torch.ones_like(x) * self.positions.to(x).expand_as(x)
        x = self.cut(self.first(x + self.positions, causal, padding))
        return self.last(self.second(x + before + like, causal, padding))


def fit(kind: type[pl.LightningModule], devices: int, data: Any = sequences, **callback: Any) -> Any:
    pl.seed_everything(2, verbose=False)
    module, synthetic = kind(), SyntheticGradients(**callback)
    strategy = SyntheticGradientStrategy(timeout=30.0) if devices > 1 else "auto"
    trainer = make_trainer(devices=devices, strategy=strategy, callbacks=[synthetic] if callback is not None else [])
    trainer.fit(module, data(), data())
    return synthetic.names, state_of(module), float(trainer.callback_metrics["val_loss"])


def plain(kind: type[pl.LightningModule]) -> dict[str, Tensor]:
    pl.seed_everything(2, verbose=False)
    module = kind()
    make_trainer().fit(module, sequences(), sequences())
    return state_of(module)


KINDS: list[type[Sequences]] = [Packed, PackedThrough, Chosen, Masked]


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_compute_what_one_does(kind: type[Sequences]) -> None:
    _names, alone, loss = fit(kind, 1)
    for _rank, state, split_loss in run_ranks(2, lambda: fit(kind, 2)):
        assert_same_state(state, alone)
        assert split_loss == pytest.approx(loss, rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_with_the_true_gradient_it_is_plain_training(kind: type[Sequences]) -> None:
    assert_same_state(fit(kind, 1, predictor=TrueGradient())[1], plain(kind), exact=True)


class Demo(LightningTransformer):
    """Lightning's demo, without the download of its text."""

    def __init__(self) -> None:
        super().__init__(vocab_size=TOKENS)
        self.model = Transformer(vocab_size=TOKENS, ninp=WIDTH, nhid=WIDTH, nlayers=2, dropout=0.0)

    def prepare_data(self) -> None:
        pass

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.nll_loss(self(*batch), batch[1].reshape(-1)))


def text() -> DataLoader[Any]:
    tokens = (torch.arange(1, 41)[:, None] * torch.arange(LONG + 1)) % TOKENS
    return DataLoader(TensorDataset(tokens[:, :-1], tokens[:, 1:]), batch_size=8)


def test_the_transformer_of_the_demos_is_cut_by_itself() -> None:
    ranks = run_ranks(2, lambda: fit(Demo, 2, text, boundaries="auto"))
    _names, alone, _loss = fit(Demo, 1, text, boundaries=ranks[0][0])
    for names, state, _split_loss in ranks:
        assert names == ranks[0][0]
        assert_same_state(state, alone)
