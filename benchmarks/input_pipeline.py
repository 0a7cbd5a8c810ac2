"""Images per second of the training input, as the train loop sees it, on one data set.

    python benchmarks/input_pipeline.py digits --augment=shift
    python benchmarks/input_pipeline.py folder --data_dir=DIR --augment=cifar

Prints wall and processor time: the second tells how many images one core makes in a second.
"""

import argparse
import time

from stp_jax import data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", nargs="?", default="digits")
    parser.add_argument("--data_dir")
    parser.add_argument("--augment", default="none")
    parser.add_argument("--image_size", type=int)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--batches", type=int, default=400)
    options = parser.parse_args()

    start = time.perf_counter()
    dataset = data.load(options.name, data_dir=options.data_dir)
    loaded = time.perf_counter()
    iterator = data.train_iterator(
        dataset,
        batch_size=options.batch_size,
        seed=0,
        augment=options.augment,
        image_size=options.image_size,
    )
    next(iterator)
    ready = time.perf_counter()
    processor = time.process_time()
    for _ in range(options.batches):
        next(iterator)
    wall, processor = time.perf_counter() - ready, time.process_time() - processor
    images = options.batches * options.batch_size
    print(dataset.description)
    print(f"load {loaded - start:.1f} s, first batch {ready - loaded:.1f} s")
    print(f"{images / wall:,.0f} images/s, {images / processor:,.0f} per second of one core")


if __name__ == "__main__":
    main()
