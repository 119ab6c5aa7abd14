"""The cases of the benchmark. Each is a function of a `workbench.Bench` that yields lines of the table."""

from .speed_compare import leditspp, sega
from .speed_memory import joint_memory, memory, store_memory
from .speed_references import references
from .speed_start import records, start
from .speed_times import attention, attention_kinds, batches, growth, inversion, methods, overhead, second_edits

CASES = (inversion, methods, batches, overhead, attention, second_edits, growth, attention_kinds, memory, store_memory,
         joint_memory, leditspp, sega, references, start, records)
