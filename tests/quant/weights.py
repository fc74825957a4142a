"""Rows of weights of many kinds, and importances, the same on every machine: from a seed by exact operations alone."""

from __future__ import annotations

import numpy as np


def _two_powers(generator: np.random.Generator, low: int, high: int, shape: tuple[int, ...]) -> np.ndarray:
    return np.ldexp(np.float32(1), generator.integers(low, high, shape)).astype(np.float32)


def weights(n_rows: int, n_in: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Name -> float32 (n_rows, n_in)."""
    generator = np.random.default_rng(seed)
    shape = (n_rows, n_in)

    def normal() -> np.ndarray:
        return generator.standard_normal(shape, dtype=np.float32)

    def chance(p: float) -> np.ndarray:
        return generator.random(shape, dtype=np.float32) < np.float32(p)

    zeros = np.zeros(shape, np.float32)
    sets = {
        "normal": normal(),
        "heavy-tailed": normal() / np.sqrt(normal() ** 2 + normal() ** 2) * 0.02,
        "float16": (normal() * 0.05).astype(np.float16),
        "sparse": normal() * chance(0.1),
        "sparse positive": np.abs(normal()) * chance(0.1),
        "positive": np.abs(normal()) * 0.3,
        "negative": -np.abs(normal()) * 0.3,
        "far from zero": normal() * 0.01 + 1,
        "far below zero": normal() * 0.001 - 1,
        "half of it zero": np.maximum(normal(), 0),
        "half of it minus zero": np.where(chance(0.5), -zeros, np.abs(normal())),
        "zeros": zeros,
        "minus zeros": -zeros,
        "zeros of both signs": np.where(chance(0.5), -zeros, zeros),
        "constant": zeros + 0.37,
        "negative constant": zeros - 0.37,
        "two neighbours": np.where(chance(0.5), 1, 1 + 2**-23),
        "powers of two": _two_powers(generator, -12, 3, shape) * np.where(chance(0.5), 1, -1),
        "ties": generator.integers(-3, 4, shape) * 0.25,
        "outliers": np.where(chance(0.002), 100, normal() * 0.01),
        "large": normal() * 1e4,
        "small": normal() * 1e-7,
        "about 1e-15": normal() * 1e-15,
        "about 1e-20": normal() * 1e-20,
        "about 1e-38": normal() * 1e-38,
        "subnormal": normal() * np.float32(1e-40),
        "the smallest": generator.integers(-9, 10, shape) * np.float32(2**-149),
        "huge": normal() * 1e30,
    }
    return {name: np.ascontiguousarray(rows, dtype=np.float32) for name, rows in sets.items()}


def importances(n_in: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Name -> float32 (n_in,)."""
    generator = np.random.default_rng([seed, 1])
    uniform = generator.random(n_in, dtype=np.float32)
    sets = {
        "uniform": uniform + 0.01,
        "with zeros": np.where(generator.random(n_in) < 0.3, 0, uniform),
        "zero": np.zeros(n_in),
        "constant": np.ones(n_in),
        "of a wide range": _two_powers(generator, -40, 40, (n_in,)) * (1 + uniform),
    }
    return {name: np.ascontiguousarray(values, dtype=np.float32) for name, values in sets.items()}
