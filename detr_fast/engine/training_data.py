"""What a run trains and evaluates on: the loaders of this process, and what they say about the data."""

from __future__ import annotations

import shlex
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator
from torch.utils.data import DataLoader, Sampler

from detr_fast.data.batching import GroupedBatchSampler, build_loader
from detr_fast.data.buckets import ShapeBuckets, simulate_batches
from detr_fast.data.coco import CocoDetection, CocoFolder
from detr_fast.data.transforms import eval_transforms, train_transforms
from detr_fast.data.words import counted
from detr_fast.engine.config import TrainConfig
from detr_fast.engine.errors import ConfigError
from detr_fast.engine.signals import StopSignals, release_signals, signals_held

PADDED_SIZES = 16  # adds some 12 % of padding on COCO (docs/training-step.md)


@dataclass(frozen=True)
class TrainingData:
    """The splits of a run.

    Attributes:
        names, category_ids: of the classes, by label.
        sampler: of all processes' training batches.
        loader, validation_loader: of this process's share; no validation where the data have none.
        steps_per_epoch: of each process.
        training_images: of all processes.
        drawn: the images that pictures are drawn of.
    """

    names: tuple[str, ...]
    category_ids: tuple[int, ...]
    sampler: GroupedBatchSampler
    loader: DataLoader[Any]
    steps_per_epoch: int
    training_images: int
    validation: CocoDetection | None
    validation_loader: DataLoader[Any] | None
    drawn: CocoDetection

    def stop_workers(self) -> None:
        """End them here: at exit, Python would do so by the signal that they ignore, and wait for ever."""
        for loader in (self.loader, self.validation_loader):
            iterator = getattr(loader, "_iterator", None)
            if iterator is not None:
                iterator._shutdown_workers()


def load_training_data(
    config: TrainConfig, folder: CocoFolder, accelerator: Accelerator, message: Callable[[str], None]
) -> TrainingData:
    """Open the splits of `folder`; `message` hears what the user should know.

    Raises:
        ConfigError: fewer images than one step takes, or no box at all.
    """
    on_gpu, processes = accelerator.device.type == "cuda", accelerator.num_processes
    common: dict[str, Any] = {"workers": config.workers, "seed": config.seed, "pin_memory": on_gpu}
    dataset = CocoDetection(folder, "train", train_transforms(config.transforms))
    if len(dataset) < config.batch_size * processes:
        raise ConfigError(
            f"batch_size is {config.batch_size}, but {config.data} has only {counted(len(dataset), 'training image')}; lower it (--batch-size)"
        )
    if dataset.max_boxes == 0:
        raise ConfigError(
            f"none of the {len(dataset)} training images of {config.data} has a box: "
            f"nothing to learn; run 'detr-fast doctor {shlex.quote(config.data)}'"
        )
    area = config.transforms.max_area  # a batch of a wide and a tall image takes no more memory than any other
    buckets = None
    if on_gpu and processes == 1:  # where steps are captured, a graph a size
        expected = simulate_batches(dataset.image_sizes, config.transforms, config.batch_size, seed=config.seed)
        buckets = ShapeBuckets.fit(expected, PADDED_SIZES)
    options: dict[str, Any] = {"shuffle": True, "drop_last": True, "max_area": area, "buckets": buckets}
    loader = build_loader(dataset, config.batch_size, **options, **common)
    sampler: GroupedBatchSampler = loader.batch_sampler  # type: ignore[assignment]
    validation = validation_loader = None
    if "val" in folder.splits:
        validation = CocoDetection(folder, "val", eval_transforms(config.transforms))
        validation_loader = _share(build_loader(validation, config.batch_size, shuffle=False, **common), accelerator)
        if validation.max_boxes == 0:
            message(
                f"none of the {counted(len(validation), 'validation image')} has a box: there is no AP, and the last weights are kept as the best"
            )
    else:
        message(f"{config.data} has no validation split: nothing is evaluated (instances_val.json)")
    most = max(dataset.max_boxes, validation.max_boxes if validation else 0)
    if most > config.model.num_queries:
        message(f"an image has {most} boxes, but the model finds at most {config.model.num_queries}; raise --queries")
    return TrainingData(
        names=dataset.names,
        category_ids=dataset.category_ids,
        sampler=sampler,
        loader=_share(loader, accelerator),
        steps_per_epoch=len(sampler) // processes,
        training_images=len(dataset),
        validation=validation,
        validation_loader=validation_loader,
        drawn=validation or CocoDetection(folder, "train", eval_transforms(config.transforms)),
    )


def _share(loader: DataLoader[Any], accelerator: Accelerator) -> DataLoader[Any]:
    """The same, of this process's batches, with workers that outlast a signal to all."""
    sampler = loader.batch_sampler
    if accelerator.num_processes > 1:
        sampler = _EveryNth(sampler, accelerator.process_index, accelerator.num_processes)
    return _SteadyLoader(
        loader.dataset,
        batch_sampler=sampler,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        worker_init_fn=_leave_signals_to_the_main_process,
        generator=loader.generator,
        persistent_workers=loader.persistent_workers,
    )


class _SteadyLoader(DataLoader[Any]):
    """Its workers begin with signals held back, as torch gives them a handler that ends them before they come to `worker_init_fn`.

    Where a worker has ended, whoever asks for its batch hears of it, and not by torch's handler whatever runs at that moment, such as a step.
    """

    def __iter__(self) -> Any:
        of_children = getattr(signal, "SIGCHLD", None)  # None on Windows
        before = None if of_children is None else signal.getsignal(of_children)
        with signals_held():
            iterator = super().__iter__()
        if of_children is not None and before is not None and threading.current_thread() is threading.main_thread():
            signal.signal(of_children, before)
        return iterator


class _EveryNth(Sampler[Any]):
    """Every `count`-th batch of another sampler, from number `index` on."""

    def __init__(self, batches: Any, index: int, count: int) -> None:
        self.batches, self.index, self.count = batches, index, count

    def __iter__(self) -> Iterator[Any]:
        return (batch for number, batch in enumerate(self.batches) if number % self.count == self.index)

    def __len__(self) -> int:
        return (len(self.batches) - self.index + self.count - 1) // self.count


def _leave_signals_to_the_main_process(worker: int) -> None:
    """Schedulers and terminals signal the whole process group; without its workers, the step could not be finished."""
    for signum in StopSignals.HANDLED:
        signal.signal(signum, signal.SIG_IGN)
    release_signals()
