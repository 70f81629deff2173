"""minimal"""
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from datamodule import CIFAR10DataModule
from lightning_module import ImageClassifier
class CLI(LightningCLI):
    def add_arguments_to_parser(self, parser):
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
CLI(ImageClassifier, CIFAR10DataModule, auto_configure_optimizers=False, seed_everything_default=0)
