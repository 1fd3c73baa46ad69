"""Arrays on the wire: raw little-endian bytes with dtype and shape, never pickle."""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import PlainSerializer, PlainValidator

DTYPES = {"i4": np.dtype("<i4"), "f4": np.dtype("<f4")}


def _to_wire(array: NDArray[Any]) -> dict[str, Any]:
    name = array.dtype.str[1:]
    return {"dtype": name, "shape": list(array.shape), "data": np.ascontiguousarray(array, DTYPES[name]).tobytes()}


def _validator(name: str) -> PlainValidator:
    dtype = DTYPES[name]

    def validate(value: Any) -> NDArray[Any]:
        if isinstance(value, dict):
            if set(value) != {"dtype", "shape", "data"} or value["dtype"] != name:
                raise ValueError(
                    f"expected an array {{dtype: {name!r}, shape, data}}, got keys {sorted(map(str, value))}"
                )
            data, shape = value["data"], value["shape"]
            if not isinstance(data, bytes) or not isinstance(shape, list) or len(shape) != 1:
                raise ValueError("an array on the wire has bytes as data and a one-dimensional shape")
            if not isinstance(shape[0], int) or len(data) != shape[0] * dtype.itemsize:
                raise ValueError(f"{len(data)} bytes cannot hold {shape[0]} items of {name}")
            array = np.frombuffer(data, dtype)
        else:
            try:
                array = np.array(value, dtype)  # a copy: the caller's array may change, a message may not
            except (TypeError, OverflowError) as error:  # pydantic takes a ValueError alone as a bad field
                raise ValueError(f"no vector of {name}: {error}") from error
            if array.ndim != 1:
                raise ValueError(f"expected one dimension, got {array.ndim}")
        array.setflags(write=False)
        return array

    return PlainValidator(validate)


IntArray = Annotated[NDArray[np.int32], _validator("i4"), PlainSerializer(_to_wire)]
"""A read-only vector of int32; accepts any sequence of integers."""

FloatArray = Annotated[NDArray[np.float32], _validator("f4"), PlainSerializer(_to_wire)]
"""A read-only vector of float32; accepts any sequence of numbers."""
