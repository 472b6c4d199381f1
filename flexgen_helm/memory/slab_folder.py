from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


class SlabFolder:
    def __init__(self, path, identity, layouts):
        self.path = Path(path)
        self.path.mkdir(parents=True, exist_ok=True)
        self.layouts = layouts
        self.pool = ThreadPoolExecutor(2)

    def missing(self):
        return [j for j in self.layouts]

    def check_space(self, m):
        pass

    def write(self, j, memory):
        (self.path / f"{j}").write_bytes(memory.numpy().tobytes())

    def read(self, j, into):
        def work():
            with open(self.path / f"{j}", "rb") as f:
                f.readinto(memoryview(into.numpy())[: self.layouts[j].num_bytes])

        return self.pool.submit(work)

    def close(self):
        self.pool.shutdown()
