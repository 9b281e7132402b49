"""The type checker that tests put around every function of the packages."""

from typing import Self

from beartype import BeartypeConf, FrozenDict, beartype

# An int will do for a float. Functions are decorated one by one, where beartype cannot know which
# class Self stands for.
checked = beartype(
    conf=BeartypeConf(is_pep484_tower=True, hint_overrides=FrozenDict({Self: object}))
)
