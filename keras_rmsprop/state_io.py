"""How state gets out of an optimizer, and into it: files, and `State`s."""

from typing import Any

from keras import ops

from keras_rmsprop import codecs, restoring
from keras_rmsprop.averages import Averages
from keras_rmsprop.building import slots_of
from keras_rmsprop.slots import UNKNOWN_ORDER
from keras_rmsprop.state import State, as_array, assign_state, fingerprint, paths
from keras_rmsprop.tables import Tables


class StateIO:
    """The ways of state out of an optimizer and into it; what goes out is up to date.

    Args:
        optimizer: The optimizer.

    Attributes:
        pending: A file that was loaded before there were variables; or None.
    """

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self.pending: restoring.Pending | None = None

    def bring_up_to_date(self) -> None:
        """Load the file that is pending; let all that waits in rows follow."""
        self.load_pending()
        search = self._optimizer._search
        if search is not None and self._optimizer.built:
            search.restart_if_changed(self._optimizer._trainable_variables)
        self.catch_up()

    def catch_up(self) -> None:
        """Bring all rows of all tables up to date."""
        for i in self._optimizer._clocks:
            Tables(self._optimizer).catch_up(i)

    def before_change(self) -> None:
        """Let all follow as an option says so far; averages start, if it is one."""
        self.catch_up()
        averages = Averages(self._optimizer)
        if averages.are_new():  # else one that is off in the first step starts from 0
            averages.start()

    def before_checkpoint(self) -> None:
        """Bring all rows up to date; a `tf.train.Checkpoint` goes by position."""
        self.catch_up()
        self.warn_of_order()

    def warn_of_order(self) -> None:
        """Warn if it is unknown whether variables are in the model's order."""
        if not self._optimizer._book.order.is_certain:
            self._optimizer._warn(UNKNOWN_ORDER)

    def save(self, store: Any) -> None:
        """Save the state; see `restoring.save`."""
        self.bring_up_to_date()
        restoring.save(store, self._contents(), self.pending)

    def load(self, store: Any) -> None:
        """Load the state, or keep it until the optimizer is built."""
        optimizer, contents = self._optimizer, self._contents()
        if optimizer.built:
            self.catch_up()
            restoring.load(store, contents, optimizer.name)
            self.pending = None
        else:
            last = self._last_checkpoint()
            self.pending = restoring.load_later(store, contents, last, optimizer.name)

    def load_pending(self) -> None:
        """Load the file that is pending, if there are variables now."""
        optimizer, pending = self._optimizer, self.pending
        if optimizer.built and pending is not None:
            last = self._last_checkpoint()
            restoring.load_pending(pending, self._contents(), last, optimizer.name)
            self.pending = None

    def _contents(self) -> restoring.Contents:
        optimizer = self._optimizer
        return restoring.Contents(
            optimizer._variables,
            optimizer._book,
            optimizer._trainable_variables,
            optimizer._trainable_variables_indices,
        )

    def _last_checkpoint(self) -> Any:
        """Return what changes when a `tf.train.Checkpoint` is restored.

        There is no public way to know. Without the private one it stays None.
        """
        return vars(self._optimizer).get("_self_update_uid")

    def state(self) -> State:
        """Return the state; see `RMSprop.get_state`."""
        optimizer = self._check_built()
        self.load_pending()
        slots = []
        for i, variable in enumerate(optimizer._trainable_variables):
            current = Tables(optimizer).caught_up(i, slots_of(optimizer, i))
            slots.append(codecs.as_numbers(current, variable.shape).map(as_array))
        return State(
            int(as_array(optimizer.iterations)),
            slots,
            paths(optimizer._trainable_variables),
            optimizer._book.order.is_certain,
            [*map(fingerprint, optimizer._trainable_variables)],
        )

    def set_state(self, state: State) -> None:
        """Take over a state; see `RMSprop.set_state`."""
        optimizer = self._check_built()
        self.bring_up_to_date()
        every = optimizer.gradient_accumulation_steps or 1
        averages = Averages(optimizer)
        are_new = averages.are_new()
        assign_state(
            state,
            [slots_of(optimizer, i) for i in range(len(optimizer._velocities))],
            optimizer._trainable_variables,
            optimizer._iterations,
            steps=every,
            in_order=optimizer._book.order.is_certain,
        )
        if are_new:
            averages.start()
        for sums in optimizer._accumulated_gradients if every > 1 else []:
            sums.assign(ops.zeros(sums.shape, sums.dtype))

    def _check_built(self) -> Any:
        """Return the optimizer, if it is built."""
        check_built(self._optimizer)
        return self._optimizer


def check_built(optimizer: Any) -> None:
    """Fail if an optimizer is not built.

    Raises:
        ValueError: It is not.
    """
    if not optimizer.built:
        raise ValueError(
            "The optimizer must be built. Call `optimizer.build(variables)`, or take a "
            "step, first."
        )
