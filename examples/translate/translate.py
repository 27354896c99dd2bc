"""Names of countries, languages and currencies from Latin into Cyrillic letters, in four languages. Plain PyTorch.

The names are CLDR's, shipped inside babel. Shapes: B batch, S source letters, T written letters, K beams, N = B × K,
D width, V Cyrillic letters.
"""

import torch
from babel import Locale
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import TensorDataset

LANGUAGES = {"sr_Latn": "sr", "bs_Latn": "bs_Cyrl", "uz": "uz_Cyrl", "az": "az_Cyrl"}
TABLES = ("territories", "languages", "currencies", "scripts")
LATIN = " -abcdefghijklmnopqrstuvwxyzćčđšžçğıöşüə‘’"
CYRILLIC = " -абвгдежзийклмнопрстуфхцчшъыьэюяђјљњћџўғҝқүҳҹәөһё"
PAD, END, START = 0, 1, 2
LONGEST = 15
SOURCE, WRITTEN = 1 + LONGEST, LONGEST + 1
"""Letters of a source, its language first, and of what is written, its end last."""


class Translator(nn.Module):
    """Convolutions read, a GRU with attention writes, and a beam search chooses what it writes."""

    def __init__(self, width: int, beams: int) -> None:
        super().__init__()
        self.beams = beams
        # TorchScript sees attributes, not the module's constants.
        self.pad, self.end, self.start, self.steps = PAD, END, START, WRITTEN
        self.latin = nn.Embedding(1 + len(LANGUAGES) + len(LATIN), width, padding_idx=PAD)
        self.place = nn.Parameter(0.1 * torch.randn(SOURCE, width))
        self.reader = nn.Sequential(
            nn.Conv1d(width, width, 5, padding=2), nn.ReLU(), nn.Conv1d(width, width, 5, padding=2), nn.Tanh()
        )
        self.cyrillic = nn.Embedding(3 + len(CYRILLIC), width, padding_idx=PAD)
        # What is written mostly stands where it was read: attention starts from there, and learns to leave.
        distance_TS = torch.arange(SOURCE) - 1 - torch.arange(WRITTEN)[:, None]
        self.near = nn.Parameter(-0.5 * distance_TS.square().float())
        self.writer = nn.GRUCell(2 * width, width)
        self.choose = nn.Sequential(nn.Dropout(0.1), nn.Linear(2 * width, 3 + len(CYRILLIC)))

    def read(self, source_BS: Tensor) -> Tensor:
        """→ memory [B, S, D]."""
        letters_BSD = self.latin(source_BS) + self.latin(source_BS[:, :1]) + self.place
        return self.reader(letters_BSD.transpose(1, 2)).transpose(1, 2)

    def write(
        self, step: int, letter_N: Tensor, state_ND: Tensor, memory_NSD: Tensor, padding_NS: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Look, and go on by one letter → scores of what follows [N, V], and the next state [N, D]."""
        similar_NS = (memory_NSD @ state_ND.unsqueeze(2)).squeeze(2) + self.near[step]
        seen_ND = (similar_NS.masked_fill(padding_NS, -1e9).softmax(1).unsqueeze(1) @ memory_NSD).squeeze(1)
        state_ND = self.writer(torch.cat([self.cyrillic(letter_N), seen_ND], 1), state_ND)
        return self.choose(torch.cat([state_ND, seen_ND], 1)), state_ND

    def forward(self, source: Tensor) -> dict[str, Tensor]:
        """The best of several ways to write each name: source [B, S] int64 → letters [B, T] int64, score [B].

        The loop has a fixed number of steps, which every format can hold; TorchScript ends it when all has ended, which
        changes nothing: what would follow is padding.
        """
        B, K, V = source.shape[0], self.beams, self.choose[1].out_features
        memory_NSD = self.read(source).repeat_interleave(K, 0)
        padding_NS = source.eq(self.pad).repeat_interleave(K, 0)
        state_ND = memory_NSD.mean(1)
        letter_BK = torch.full([B, K], self.start, dtype=torch.long, device=source.device)
        written_BKT = letter_BK[:, :, None][:, :, :0]
        ended_BK = letter_BK.eq(self.end)
        places = torch.arange(K, device=source.device)
        # At the start all beams are alike, and only the first counts; what has ended goes on with padding alone.
        score_BK = places.gt(0).to(memory_NSD.dtype).mul(-1e9).expand(B, K)
        only_pad_V = torch.arange(V, device=source.device).ne(self.pad).to(memory_NSD.dtype).mul(-1e9)
        for step in range(self.steps):
            scores_NV, state_ND = self.write(step, letter_BK.reshape(-1), state_ND, memory_NSD, padding_NS)
            step_BKV = torch.where(ended_BK[:, :, None], only_pad_V, scores_NV.log_softmax(1).view(B, K, V))
            score_BK, best_BK = (score_BK[:, :, None] + step_BKV).view(B, K * V).topk(K, 1)
            beam_BK, letter_BK = best_BK // V, best_BK % V
            state_ND = state_ND[(torch.arange(B, device=source.device)[:, None] * K + beam_BK).view(-1)]
            kept_BKT = written_BKT.gather(1, beam_BK[:, :, None].expand(-1, -1, written_BKT.shape[2]))
            written_BKT = torch.cat([kept_BKT, letter_BK[:, :, None]], 2)
            ended_BK = ended_BK.gather(1, beam_BK) | letter_BK.eq(self.end)
            if torch.jit.is_scripting() and bool(ended_BK.all()):
                break
        letters_BT = F.pad(written_BKT[:, 0], [0, self.steps - written_BKT.shape[2]])
        return {"letters": letters_BT, "score": score_BK[:, 0]}


class Teacher(nn.Module):
    """The loss of a translator that is told, at every letter, what it should have written before."""

    def __init__(self, translator: Translator) -> None:
        super().__init__()
        self.translator = translator

    def forward(self, source_BS: Tensor, target_BT: Tensor) -> Tensor:
        memory_BSD = self.translator.read(source_BS)
        before_BT = F.pad(target_BT[:, :-1], (1, 0), value=START)
        state_BD, scores = memory_BSD.mean(1), []
        for step, letter_B in enumerate(before_BT.unbind(1)):
            scores_BV, state_BD = self.translator.write(step, letter_B, state_BD, memory_BSD, source_BS.eq(PAD))
            scores.append(scores_BV)
        scores_BTV = torch.stack(scores, 1)
        return F.cross_entropy(scores_BTV.flatten(0, 1), target_BT.flatten(), ignore_index=PAD)


def build_model(width: int, beams: int) -> nn.Module:
    return Translator(width, beams)


def encode(name: str, language: str) -> list[int]:
    """What a client sends: a number for the language, one for each lower-case Latin letter, zeros up to 16."""
    first = 1 + list(LANGUAGES).index(language)
    letters = [1 + len(LANGUAGES) + LATIN.index(letter) for letter in name]
    return [first, *letters, *[PAD] * (LONGEST - len(letters))]


def decode(letters: list[int]) -> str:
    """What was written, up to its end."""
    ended = letters.index(END) if END in letters else len(letters)
    return "".join(CYRILLIC[letter - 3] for letter in letters[:ended] if letter > START)


def build_dataset(split: str) -> TensorDataset:
    """3,000 names to learn from; what one of six names means is held out, in all languages."""
    sources, targets = [], []
    for latin, cyrillic in LANGUAGES.items():
        for table in TABLES:
            written = getattr(Locale.parse(cyrillic), table)
            for meaning, name in getattr(Locale.parse(latin), table).items():
                name, answer = name.lower(), written.get(meaning, "").lower()
                fits = 0 < len(name) <= LONGEST and 0 < len(answer) <= LONGEST
                spelled = set(name) <= set(LATIN) and set(answer) <= set(CYRILLIC)
                wanted = (sum(meaning.encode()) % 6 == 0) == (split == "validation")
                if fits and spelled and wanted:
                    letters = [3 + CYRILLIC.index(letter) for letter in answer]
                    sources.append(encode(name, latin))
                    targets.append([*letters, END, *[PAD] * (LONGEST - len(letters))])
    return TensorDataset(torch.tensor(sources), torch.tensor(targets))


def exact_match(written: Tensor, target: Tensor) -> float:
    """Share of the names that are written without a mistake."""
    return written.eq(target).all(1).double().mean().item()


def character_error_rate(written: Tensor, target: Tensor) -> float:
    """Letters to insert, delete or replace (Levenshtein), for each letter of the right answers."""
    edits = letters = 0
    for got, wanted in zip(map(decode, written.tolist()), map(decode, target.tolist()), strict=True):
        row = list(range(len(wanted) + 1))
        for place, letter in enumerate(got, 1):
            above, row = row, [place]
            for column, other in enumerate(wanted, 1):
                row.append(min(above[column] + 1, row[-1] + 1, above[column - 1] + (letter != other)))
        edits, letters = edits + row[-1], letters + len(wanted)
    return edits / letters


def main(context, epochs: int, batch_size: int, learning_rate: float) -> nn.Module:
    """Called in every rank of a torchrun-like environment; the process group exists. Returns the trained model."""
    model = context.build_model().to(context.device)
    teacher = DistributedDataParallel(Teacher(model))
    sources, targets = (tensor.to(context.device) for tensor in context.build_dataset("train").tensors)
    held_out, answers = (tensor.to(context.device) for tensor in context.build_dataset("validation").tensors)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    steps_per_epoch = len(sources) // batch_size
    steps = epochs * steps_per_epoch
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    torch.manual_seed(context.seed + context.rank)
    state = {"model": model, "optimizer": optimizer, "schedule": schedule}
    saved = context.checkpoint.load(state)

    for step in range(saved.step if saved else 0, steps):
        epoch, number = divmod(step, steps_per_epoch)
        order = torch.randperm(len(sources), generator=torch.Generator().manual_seed(context.seed + epoch))
        mine = order[number * batch_size : (number + 1) * batch_size][context.rank :: context.world_size]
        loss = teacher(sources[mine], targets[mine])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()

        done = step + 1
        if done % steps_per_epoch == 0:
            model.eval()
            with torch.no_grad():
                written = model(held_out)["letters"]
            model.train()
            measured = {"train_loss": loss, "validation_exact_match": exact_match(written, answers)}
            context.report(measured, step=done, steps=steps)
        if context.checkpoint.is_due(done):
            context.checkpoint.save(state, step=done)
    return model
