"""The training engine: TOML to torchtitan's Trainer.

    result = train("my.toml", training={"steps": 100})

load_config reads and checks a TOML file; train runs it in this process and returns a Result. The
package itself can be called as train: `lowline.train("my.toml")`.
"""

from lowline._lazy import make_callable, offer

__getattr__, __dir__ = offer(
    __name__,
    {
        "load_config": "lowline.train.api",
        "train": "lowline.train.api",
        "Result": "lowline.train.engine.run",
    },
)
make_callable(__name__, "train")
