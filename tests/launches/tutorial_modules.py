"""LightningModules and data as tutorials write them: nothing of bigmodel."""

import lightning as L
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset


def digits(n, seed):
    draws = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 4, (n,), generator=draws)
    x = torch.randn(n, 16, generator=draws) * 0.3
    x[torch.arange(n), y] += 2
    return TensorDataset(x, y)


class DigitsData(L.LightningDataModule):
    def __init__(self, batch_size: int = 16):
        super().__init__()
        self.save_hyperparameters()

    def setup(self, stage):
        self.train, self.val = digits(64, 0), digits(32, 1)

    def train_dataloader(self):
        return DataLoader(self.train, batch_size=self.hparams.batch_size, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.val, batch_size=self.hparams.batch_size)


class LitMNIST(L.LightningModule):
    def __init__(self, hidden_size: int = 8, learning_rate: float = 1e-2):
        super().__init__()
        self.save_hyperparameters()
        self.model = nn.Sequential(nn.Linear(16, hidden_size), nn.ReLU(), nn.Linear(hidden_size, 4))

    def forward(self, x):
        return self.model(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        logits = self(x)
        self.log("val_loss", F.cross_entropy(logits, y), prog_bar=True)
        self.log("val_acc", (logits.argmax(1) == y).float().mean(), prog_bar=True)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=self.hparams.learning_rate)


class OwnLoaders(LitMNIST):
    def train_dataloader(self):
        return DataLoader(digits(64, 0), batch_size=16, shuffle=True)

    def val_dataloader(self):
        return DataLoader(digits(32, 1), batch_size=16)


class GAN(L.LightningModule):
    def __init__(self, latent_dim: int = 4):
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        self.generator, self.discriminator = nn.Linear(latent_dim, 16), nn.Linear(16, 1)

    def training_step(self, batch):
        x, _ = batch
        optimizer_g, optimizer_d = self.optimizers()
        z = torch.randn(len(x), self.hparams.latent_dim).type_as(x)
        real, fake = torch.ones(len(x), 1).type_as(x), torch.zeros(len(x), 1).type_as(x)

        self.toggle_optimizer(optimizer_g)
        g_loss = F.binary_cross_entropy_with_logits(self.discriminator(self.generator(z)), real)
        self.log("g_loss", g_loss, prog_bar=True)
        self.manual_backward(g_loss)
        optimizer_g.step()
        optimizer_g.zero_grad()
        self.untoggle_optimizer(optimizer_g)

        self.toggle_optimizer(optimizer_d)
        d_loss = F.binary_cross_entropy_with_logits(self.discriminator(x), real)
        d_loss += F.binary_cross_entropy_with_logits(self.discriminator(self.generator(z).detach()), fake)
        self.log("d_loss", d_loss / 2, prog_bar=True)
        self.manual_backward(d_loss / 2)
        optimizer_d.step()
        optimizer_d.zero_grad()
        self.untoggle_optimizer(optimizer_d)

    def on_train_epoch_end(self):
        self.logger.experiment.add_image("generated_images", self.generator.weight, self.current_epoch)

    def configure_optimizers(self):
        networks = (self.generator, self.discriminator)
        return [torch.optim.SGD(network.parameters(), lr=0.1) for network in networks], []


class Stream(IterableDataset):
    def __iter__(self):
        yield from digits(64, 0)


class StreamData(L.LightningDataModule):
    def train_dataloader(self):
        return DataLoader(Stream(), batch_size=16)


class ListBatches(LitMNIST):
    def training_step(self, batch, batch_idx):
        loss = sum(F.cross_entropy(self(x[None]), y[None]) for x, y in batch) / len(batch)
        self.log("train_loss", loss)
        return loss

    def train_dataloader(self):
        return DataLoader(digits(64, 0), batch_size=16, collate_fn=list)


class StepLRByEpoch(OwnLoaders):
    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.1)]


class OneEpochEach(L.LightningModule):
    """Two optimizers, of which each batch trains one."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.encoder, self.head = nn.Linear(16, 8), nn.Linear(8, 4)

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()[batch_idx % 2]
        x, y = batch
        loss = F.cross_entropy(self.head(self.encoder(x)), y)
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()

    def validation_step(self, batch):
        x, y = batch
        loss = F.cross_entropy(self.head(self.encoder(x)), y)
        self.log_dict({"val_loss/a": loss, "val_loss/b": loss})

    def configure_optimizers(self):
        return torch.optim.Adam(self.encoder.parameters()), torch.optim.Adam(self.head.parameters())
