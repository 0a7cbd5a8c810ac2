"""Checkpoints of one training stage: model, optimizer, position in the data, all or nothing.

Orbax writes a step into a temporary folder in the background; a manifest of SHA-256 digests joins
it, and the folder is renamed when it is complete. So a run that is killed while saving leaves the
step before it, and a step that the disk has damaged since is recognised. Leaving the context waits.
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import orbax.checkpoint as ocp

from experiments.runtime.manifest import find_damage, write_manifest
from experiments.runtime.processes import from_first, is_first


class CheckpointError(RuntimeError):
    """A checkpoint that is whole does not fit this run."""


class _Manager(ocp.CheckpointManager):
    """Orbax's, which leaves JAX's preemption service alone: its step numbers are the run's own."""

    def reached_preemption(self, step: int) -> bool:
        """Never; see `processes.pending`."""
        return False


class StageCheckpoints:
    """The two newest checkpoints of a stage, in a folder of their own."""

    def __init__(self, folder: Path, *, keep: int = 2):
        """Opens the folder, which is made if it does not exist."""
        self._folder = folder.absolute()
        self._saving = 0  # the step whose manifest is due
        self._manager = _Manager(
            self._folder,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                create=True,
                cleanup_tmp_directories=True,
                async_options=ocp.AsyncOptions(post_finalization_callback=self._seal),
            ),
        )

    def __enter__(self) -> StageCheckpoints:
        """Nothing to do: the folder is open."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Waits until the last save is on disk."""
        self._manager.close()

    def _seal(self) -> None:
        """Writes the manifest of the step that Orbax is about to rename into place."""
        if is_first():
            step = self._saving
            (unfinished,) = self._folder.glob(f"{step}.orbax-checkpoint-tmp*")
            write_manifest(unfinished)

    def save(self, step: int, state: Any, data: Any) -> None:
        """Saves state (a tree of arrays) and data (a grain iterator) in the background.

        Raises:
          OSError: this save cannot be made, or the one before it could not.
        """
        if step in self._manager.all_steps():
            return
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            # The position is the same in all processes, so that their number may change.
            data=ocp.args.JsonSave(data.get_state()),
        )
        self.wait()  # the manifest of the step before is written by then
        self._saving = step
        self._manager.save(step, args=items, force=True)

    def wait(self) -> None:
        """Returns when everything saved is on disk."""
        self._manager.wait_until_finished()

    def restore(self, state: Any, data: Any) -> tuple[int, Any]:
        """The newest checkpoint that is whole, as (step, state); (0, state) if there is none.

        Checkpoints that are unfinished or damaged are named and deleted.

        Args:
          state: a tree of the same structure, shapes and shardings.
          data: a grain iterator, set to where it was.

        Raises:
          CheckpointError: the checkpoint is whole, but of another program or configuration.
        """
        step = self._newest_whole()
        if step is None:
            return 0, state
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        args = ocp.args.Composite(
            state=ocp.args.StandardRestore(target), data=ocp.args.JsonRestore()
        )
        try:
            items = self._manager.restore(step, args=args)
            data.set_state(items["data"])
        except (KeyError, TypeError, ValueError) as error:  # whatever the libraries below raise
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CheckpointError(
                f"{self._folder / str(step)} is whole but does not fit this run ({reason}); "
                "continue it with the version that made it, or use another --workdir"
            ) from error
        return step, items["state"]

    def _newest_whole(self) -> int | None:
        """The newest step that its manifest confirms, which the first process finds out."""
        steps = sorted(self._manager.all_steps(), reverse=True)
        damage = from_first(lambda: self._damage_down_to_whole(steps))
        for step, reason in zip(steps, damage, strict=False):
            if reason is None:
                return step
            if is_first():
                print(f"checkpoint of step {step} cannot be used, going back: {reason}", flush=True)
            self._manager.delete(step)
        if steps and is_first():
            print(f"{self._folder} holds no whole checkpoint: starting from its beginning")
        return None

    def _damage_down_to_whole(self, steps: list[int]) -> list[str | None]:
        found: list[str | None] = []
        for step in steps:
            found.append(find_damage(self._folder / str(step)))
            if found[-1] is None:
                break
        return found
