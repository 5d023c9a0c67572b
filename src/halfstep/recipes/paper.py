"""The paper's models at full scale, which take days of training on many accelerators.

The networks, batch sizes, learning rates, warm-up, decay, dropout, EMA, clipping, augmentation and numbers of updates
are those that the authors published. The released configurations take precedence over the paper: for example, CIFAR-10
is distilled at a learning rate of 5e-5. Two choices are ours. The warm-up is linear, because the shape of the authors'
warm-up is not public. The number of timesteps is a power of two instead of 1000, so that every student uses whole
timesteps.

Source: Salimans & Ho 2022 (arXiv:2202.00512), section 5 and appendices, and the authors' configurations.
"""

from dataclasses import replace
from typing import Final

from halfstep.data import DataConfig
from halfstep.measure.evaluate import Evaluation
from halfstep.objectives import Training
from halfstep.recipes.networks import UNetConfig
from halfstep.recipes.schema import TEACHER, ChainConfig, DataFacts, ModelConfig, Recipe, recipes
from halfstep.train.settings import Engine


def _network(
    channels: int, multipliers: tuple[int, ...], attention: tuple[bool, ...], head_dim: int, embedding: int, clock: int
) -> UNetConfig:
    return UNetConfig(
        block_out_channels=tuple(channels * multiplier for multiplier in multipliers),
        layers_per_block=3,
        attention=attention,
        attention_head_dim=head_dim,
        norm_eps=1e-6,
        resample="resnet",
        time_scale_shift="scale_shift",
        time_embedding_dim=embedding,
        flip_sin_to_cos=False,
        freq_shift=1,
        num_train_timesteps=clock,
    )


PAPER_CIFAR10: Final = _network(256, (1, 1, 1), (False, True, True), 256, 1024, 8192)
PAPER_IMAGENET64: Final = _network(192, (1, 2, 3, 4), (False, True, True, True), 64, 768, 1024)
PAPER_LSUN128: Final = _network(64, (1, 2, 4, 6, 8), (False, False, True, True, True), 64, 768, 1024)

EVALUATION: Final = Evaluation(
    num_samples=50_000, num_reference=50_000, teacher_steps=(1024, 512, 256, 128, 64, 32, 16, 8, 4, 2, 1)
)


@recipes.register("cifar10_paper")
def cifar10_paper() -> Recipe:
    """The paper's unconditional CIFAR-10, with x0-prediction and 60 million parameters, from 8192 steps to 1."""
    return Recipe(
        name="cifar10_paper",
        data=DataConfig(source="uoft-cs/cifar10", flip=True),
        facts=DataFacts(shape=(3, 32, 32), num_samples=50_000, num_classes=10),
        network=PAPER_CIFAR10,
        model=ModelConfig(prediction="x0", conditional=False),
        teacher=replace(TEACHER, num_updates=800_000, weight_decay=0.001, dropout=0.2),
        chain=ChainConfig(start_steps=8192, training=Training(num_updates=50_000, learning_rate=5e-5)),
        evaluation=EVALUATION,
    )


def _large(name: str, data: DataConfig, facts: DataFacts, network: UNetConfig, num_updates: int) -> Recipe:
    """Return a recipe for one of the larger data sets. The network predicts x0 and eps, the batch size is 2048, and the
    chain goes from 1024 steps to 1.
    """
    return Recipe(
        name=name,
        data=data,
        facts=facts,
        network=network,
        model=ModelConfig(prediction="both", conditional=facts.num_classes > 0),
        teacher=replace(TEACHER, num_updates=num_updates, batch_size=2048, learning_rate=3e-4, dropout=0.1),
        chain=ChainConfig(training=Training(num_updates=50_000, batch_size=2048, learning_rate=1e-4)),
        evaluation=EVALUATION,
        # A batch of 2048 does not fit on one GPU. Only the dropout masks depend on the micro batch.
        engine=Engine(micro_batch=32),
    )


@recipes.register("imagenet64_paper")
def imagenet64_paper() -> Recipe:
    """The paper's class-conditional ImageNet 64x64, with x0 and eps outputs and 296 million parameters, from 1024 steps
    to 1."""
    data = DataConfig(source="ILSVRC/imagenet-1k", image_size=64, resample="area", channels=3, flip=True)
    facts = DataFacts(shape=(3, 64, 64), num_samples=1_281_167, num_classes=1000)
    return _large("imagenet64_paper", data, facts, PAPER_IMAGENET64, 550_000)


def _lsun(name: str, num_samples: int) -> Recipe:
    # LSUN is not on the Hub.
    folder = name.removesuffix("128_paper")
    data = DataConfig(source=folder, image_size=128, resample="bilinear", channels=3, labels=False, flip=True)
    facts = DataFacts(shape=(3, 128, 128), num_samples=num_samples)
    return _large(name, data, facts, PAPER_LSUN128, 400_000)


@recipes.register("lsun_bedroom128_paper")
def lsun_bedroom128_paper() -> Recipe:
    """The paper's LSUN bedrooms 128x128 from a folder (--data FOLDER), with x0 and eps outputs and 140 million
    parameters."""
    return _lsun("lsun_bedroom128_paper", 3_033_042)


@recipes.register("lsun_church128_paper")
def lsun_church128_paper() -> Recipe:
    """The paper's LSUN churches 128x128 from a folder (--data FOLDER), with x0 and eps outputs and 140 million
    parameters."""
    return _lsun("lsun_church128_paper", 126_227)
