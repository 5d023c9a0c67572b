"""The recipes that come with halfstep."""

from dataclasses import replace

from halfstep.data import DataConfig
from halfstep.measure.evaluate import Evaluation
from halfstep.objectives import FINISHING, Training
from halfstep.recipes.networks import MLPConfig, UNetConfig
from halfstep.recipes.schema import SECOND_ORDER, TEACHER, FinishConfig, ModelConfig, Recipe, recipes
from halfstep.train.settings import Engine


@recipes.register("digits")
def digits() -> Recipe:
    """The demo: train on scikit-learn's 1,797 digits (8x8) and distil to one step, in minutes on two CPU cores."""
    return Recipe(
        name="digits",
        data=DataConfig(source="digits"),
        network=UNetConfig(
            block_out_channels=(32, 64),
            layers_per_block=1,
            attention=(False, False),
            mid_attention=False,
            norm_num_groups=8,
            time_scale_shift="default",
        ),
        # With class labels, even an undistilled teacher needs few steps, so the demo would show little.
        model=ModelConfig(conditional=False),
        teacher=Training(
            num_updates=1050,
            batch_size=96,
            learning_rate=2e-3,
            warmup_updates=50,
            adam_betas=(0.9, 0.99),
            ema_decay=0.995,
        ),
        # Later students have more to learn and tolerate a higher learning rate.
        chain=SECOND_ORDER.model_copy(
            update={
                "training": Training(
                    num_updates=300, batch_size=64, learning_rate=1e-3, warmup_updates=20, adam_betas=(0.9, 0.99)
                ),
                "updates_at": {2: 400, 1: 500},
                "learning_rate_at": {8: 6e-4, 4: 7e-4},
            }
        ),
        finish=FinishConfig(
            steps=(8, 4, 2, 1),
            training=Training(
                num_updates=180, batch_size=48, learning_rate=6e-5, adam_betas=(0.0, 0.99), ema_decay=0.98
            ),
            # The student with 8 steps is already as good as its teacher, so it needs fewer updates.
            updates_at={8: 80, 2: 400, 1: 220},
            lead_updates=0,
        ),
        evaluation=Evaluation(num_samples=2000, batch_size=500),
        engine=Engine(log_every=20),
    )


@recipes.register("digits_long")
def digits_long() -> Recipe:
    """The demo with more updates, for better students in a quarter of an hour on two CPU cores."""
    demo = digits()
    return demo.model_copy(
        update={
            "name": "digits_long",
            "teacher": replace(demo.teacher, num_updates=1500, batch_size=128),
            "chain": demo.chain.model_copy(
                update={
                    "training": replace(demo.chain.training, num_updates=700),
                    "updates_at": {8: 500, 4: 800},
                }
            ),
            "finish": demo.finish.model_copy(
                update={"training": replace(demo.finish.training, num_updates=400), "updates_at": {2: 600}}
            ),
        }
    )


@recipes.register("fashion_mnist")
def fashion_mnist() -> Recipe:
    """Train on 28x28 greyscale clothing images in 10 classes and distil to one step, in two hours on two CPU cores."""
    return Recipe(
        name="fashion_mnist",
        data=DataConfig(source="zalando-datasets/fashion_mnist"),
        network=UNetConfig(
            block_out_channels=(16, 48, 96),
            layers_per_block=1,
            attention=(False, False, True),
            norm_num_groups=8,
            time_embedding_dim=192,
        ),
        teacher=Training(
            num_updates=6500,
            batch_size=64,
            learning_rate=1e-3,
            warmup_updates=200,
            adam_betas=(0.9, 0.99),
            ema_decay=0.999,
        ),
        chain=SECOND_ORDER.model_copy(
            update={
                "training": Training(
                    num_updates=500, batch_size=64, learning_rate=4e-4, warmup_updates=40, adam_betas=(0.9, 0.99)
                ),
                "updates_at": {8: 600, 1: 700},
            }
        ),
        finish=FinishConfig(
            steps=(8, 4, 2, 1),
            training=replace(FINISHING, num_updates=250, learning_rate=4e-5),
            updates_at={4: 350, 2: 500, 1: 450},
            lead_updates=30,
        ),
        evaluation=Evaluation(num_samples=4000, batch_size=500),
    )


@recipes.register("cifar10")
def cifar10() -> Recipe:
    """Train a network with 15 million parameters on 32x32 colour images in 10 classes, in hours on one GPU."""
    return Recipe(
        name="cifar10",
        data=DataConfig(source="uoft-cs/cifar10", flip=True),
        network=UNetConfig(block_out_channels=(96, 192, 192), attention=(False, True, False), attention_head_dim=64),
        teacher=replace(TEACHER, weight_decay=0.001, ema_decay=0.9995, dropout=0.1),
        chain=SECOND_ORDER.model_copy(update={"training": Training(num_updates=10_000, learning_rate=1e-4)}),
        evaluation=Evaluation(num_samples=10_000, teacher_steps=(256, 64)),
        engine=Engine(precision="bf16"),
    )


@recipes.register("cifar10_small")
def cifar10_small() -> Recipe:
    """CIFAR-10 with a 3-million-parameter network: rough images in about an hour and a half on two CPU cores."""
    smaller = fashion_mnist()
    training = smaller.chain.training
    return smaller.model_copy(
        update={
            "name": "cifar10_small",
            "data": DataConfig(source="uoft-cs/cifar10", flip=True),
            "network": smaller.network.model_copy(update={"block_out_channels": (32, 64, 128)}),
            "teacher": replace(smaller.teacher, num_updates=3300),
            "chain": smaller.chain.model_copy(
                update={
                    "training": replace(training, num_updates=320, warmup_updates=30),
                    "updates_at": {8: 350, 1: 400},
                }
            ),
            "finish": FinishConfig(steps=(1,), training=replace(FINISHING, num_updates=250)),
            "evaluation": replace(smaller.evaluation, num_samples=2000),
        }
    )


@recipes.register("images")
def images() -> Recipe:
    """Train on your own images with one GPU: `halfstep run images --data FOLDER --data.image-size 32`."""
    data = DataConfig(source="images", image_size=32, channels=3, labels=False)
    return cifar10().model_copy(update={"name": "images", "data": data})


@recipes.register("images_small")
def images_small() -> Recipe:
    """Train on a few hundred of your own images, in colour at 32x32, in under an hour on two CPU cores."""
    return Recipe(
        name="images_small",
        data=DataConfig(source="images", image_size=32, channels=3, labels=False, flip=True),
        network=UNetConfig(
            block_out_channels=(32, 64, 64),
            layers_per_block=1,
            attention=(False, False, True),
            norm_num_groups=8,
            attention_head_dim=32,
        ),
        # With many updates, the network would memorise the few images. Fewer updates need a shorter moving average.
        teacher=Training(
            num_updates=3000,
            batch_size=16,
            learning_rate=1e-3,
            warmup_updates=100,
            weight_decay=0.01,
            ema_decay=0.995,
            dropout=0.1,
        ),
        chain=SECOND_ORDER.model_copy(
            update={"training": Training(num_updates=300, batch_size=16, learning_rate=3e-4, warmup_updates=20)}
        ),
        evaluation=Evaluation(num_samples=300, teacher_steps=(8, 4, 2, 1), teacher_heun_steps=(8,)),
    )


@recipes.register("images_tiny")
def images_tiny() -> Recipe:
    """Train on a few hundred of your own images, in colour at 16x16, and distil to four steps in ten minutes on one CPU
    core."""
    demo = digits()
    return Recipe(
        name="images_tiny",
        data=DataConfig(source="images", image_size=16, channels=3, labels=False, flip=True),
        network=demo.network,
        teacher=replace(demo.teacher, num_updates=1200, batch_size=64),
        chain=SECOND_ORDER.model_copy(
            update={"end_steps": 4, "training": replace(demo.chain.training, num_updates=150, learning_rate=7e-4)}
        ),
        evaluation=Evaluation(num_samples=600),
        engine=demo.engine,
    )


@recipes.register("arrays")
def arrays() -> Recipe:
    """Train on data other than images, in a .npy file of shape [n, *dims] near unit scale: `halfstep run arrays --data
    x.npy`."""
    return Recipe(
        name="arrays",
        data=DataConfig(source="data.npy"),
        network=MLPConfig(width=256, depth=4),
        teacher=Training(num_updates=20_000, batch_size=256, learning_rate=1e-3, warmup_updates=1000, ema_decay=0.999),
        chain=SECOND_ORDER.model_copy(
            update={"training": Training(num_updates=4000, batch_size=256, learning_rate=3e-4)}
        ),
    )
