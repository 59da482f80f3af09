"""What a stage trains, and how it becomes the parameters of a forward pass.

Without LoRA, all parameters are trained, in `setup.param_dtype`. With LoRA, only adapters and a
scalar head are trained. The frozen weights are kept in the compute dtype and are an argument of
every step; they are in neither the train state, nor its moments, nor its checkpoints.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import numpy as np

from grm_jax.model.lora import adapter_table, attach, merge
from grm_jax.model.params import Params, init_params
from grm_jax.model.storage import param_shardings
from grm_jax.training.run import Run

# (trained parameters, frozen ones or None) -> the parameters of a forward pass
Assemble = Callable[[Params, Params | None], Params]


def as_it_is(trained: Params, frozen: Params | None) -> Params:
    """`Trainable.assemble` where everything is trained."""
    del frozen
    return trained


class Trainable:
    """The trained parameters of a stage.

    Args:
      run: the run, whose setup says whether there are adapters.
      start: the model that training starts from: "base", a stage, or a path (see `Run.params`).
      num_labels: the width of the scalar head; 0 for none.

    Attributes:
      table: the rows of the trained parameters in the parameter table.
      dtype: the dtype of the trained parameters.
      adapters: whether adapters are trained.
      frozen: the weights that the adapters belong to; None when everything is trained.
    """

    def __init__(self, run: Run, start: str, num_labels: int = 0):
        self._run, self._start, self._labels = run, start, num_labels
        self._whole = run.table(num_labels)
        lora = run.setup.lora
        self.adapters = lora.rank > 0
        # Adapters are few: always float32.
        self.dtype = "float32" if self.adapters else run.setup.param_dtype
        self.table = adapter_table(self._whole, lora) if self.adapters else self._whole

    @functools.cached_property
    def frozen(self) -> Params | None:
        if not self.adapters:
            return None
        params = self._run.params(self._start, dtype=self._run.model.compute_dtype)
        if self._labels:
            params.pop("head", None)  # the scalar head is the only one
        return params

    def untrained(self) -> Params:
        """The model before training, in the compute dtype; with adapters, what is frozen."""
        return self.frozen or self._run.params(self._start, dtype=self._run.model.compute_dtype)

    def begin(self) -> Params:
        """The trained parameters before the first step."""
        if not self.adapters:
            return self._run.params(self._start, self._labels, dtype=self.dtype)
        key = jax.random.fold_in(self._run.stage_key("init"), 1)
        shardings = param_shardings(self.table, self._run.mesh)
        return jax.jit(lambda key: init_params(self.table, key), out_shardings=shardings)(key)

    def assemble(self, trained: Params, frozen: Params | None) -> Params:
        """The parameters of a forward pass; pure."""
        if frozen is None:
            return trained
        return attach(frozen, trained, self._whole, self._run.setup.lora.scale)

    def whole(self, trained: Params) -> Params:
        """The model that is written: adapters added to the weights, plain arrays.

        In bfloat16 by random rounding, so that changes of less than its last bit are kept on
        average.
        """
        if self.frozen is None:
            return trained
        shardings = param_shardings(self._whole, self._run.mesh)
        key = jax.random.key_data(jax.random.fold_in(self._run.stage_key("init"), 2))
        combine = jax.jit(
            lambda trained, frozen, key: merge(
                self.assemble(trained, frozen), jax.random.wrap_key_data(key)
            ),
            out_shardings=shardings,
        )
        return combine(trained, self.frozen, np.asarray(key))
