"""Small GGUF files, written by the gguf package."""

import gguf
import numpy as np


def written(path):
    """The bytes of a file with metadata of every kind and two tensors."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("a.number", 7)
    writer.add_float32("a.float", 0.5)
    writer.add_bool("a.flag", True)
    writer.add_array("a.words", ["one", "two", "three"])
    writer.add_array("a.numbers", [1, 2, 3])
    writer.add_tensor("first", np.arange(64, dtype=np.float32).reshape(2, 32))
    writer.add_tensor("second", np.zeros((2, 18), np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    return finished(writer, path)


def finished(writer, path):
    """Write what a writer has collected; the bytes of the file."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()
