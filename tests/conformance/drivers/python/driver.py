"""The Python client's conformance driver; ../../README.md says what it is asked."""

import gc
import json
import os
import sys
import threading
import time

import numpy as np

import strait

FILE_DTYPES = {"bool8": "?", "bfloat16": "<u2", "float8_e4m3fn": "u1", "float8_e5m2": "u1"}


class Driver:
    def __init__(self):
        self.session = None
        self.handles = {}
        self.prepared = {}
        # Streams and readers of channels that are to stay open.
        self.kept = []

    def hello(self):
        language = os.environ.get("STRAIT_DRIVER", "python")
        return {"language": language, "client": f"strait-python/{strait.__version__}", "fork": "refused", "channels": True}

    def connect(self, address, renew=True):
        self.close()
        self.prepared.clear()
        self.session = strait.connect(address, renew=renew)
        return {"host_id": self.session.host_id, "move_min_bytes": self.session.move_min_bytes, "inline_bytes": self.session.inline_bytes}

    def close(self):
        if self.session is not None:
            self.session.close()
        self.kept.clear()
        return {}

    def make(self, dtype, shape, file, how, **fields):
        data = np.frombuffer(open(file, "rb").read(), np.uint8)
        made = self.session.empty(shape, dtype)
        if how == "copy":
            made = np.empty(shape, made.dtype)
        made.reshape(-1).view(np.uint8)[:] = data
        self.handles[fields["as"]] = made
        return array(made)

    def put(self, handle, name, replace=False):
        before = self.session.client_stats().copied_bytes
        self.session.put(name, self.handles[handle], replace=replace)
        return {"copied_bytes": self.session.client_stats().copied_bytes - before}

    def get(self, name, lease_ms=None, **fields):
        got = self.session.get(name, lease=seconds(lease_ms))
        self.handles[fields["as"]] = got
        return array(got)

    def read(self, handle, file):
        write(self.handles[handle], file)
        return array(self.handles[handle])

    def write(self, handle, file):
        self.handles[handle].reshape(-1).view(np.uint8)[:] = np.fromfile(file, np.uint8)
        return {}

    def call(self, kernel, inputs, repeat=1, cancel_after_ms=None, files=None, publish=None, **fields):
        session = self.session
        keep = fields.pop("as", {})
        given = {port: self.handles[x["handle"]] if isinstance(x, dict) else x for port, x in inputs.items()}
        options = {key: fields[key] for key in ("parameters", "replace", "verify", "request_id", "inline_bytes") if key in fields}
        options.update(deadline=seconds(fields.get("deadline_ms")), lease=seconds(fields.get("lease_ms")))
        before = session.client_stats().copied_bytes
        times, result, call = [], None, None
        for _ in range(repeat):
            if result is not None:
                result.release()
            start = time.perf_counter()
            call = session.start(kernel, inputs=given, publish=publish, **options)
            if cancel_after_ms is not None:
                threading.Timer(cancel_after_ms / 1000, call.cancel).start()
            result = call.result()
            times.append(time.perf_counter() - start)
        info = result.info
        outputs = {result.name: result} if isinstance(result, strait.Array) else dict(result)
        for port, file in (files or {}).items():
            write(outputs[port], file)
        answer = {
            "outputs": {port: array(output) for port, output in outputs.items()},
            "notes": [{"key": key, "text": text} for key, text in info.notes.items()],
            "pages": [{"port": p.port, "device": p.device, "inode": p.inode} for p in info.pages],
            "copied_bytes": info.copied_bytes,
            "client_copied_bytes": session.client_stats().copied_bytes - before,
            "seconds": times,
        }
        for port, output in outputs.items():
            if port in keep:
                self.handles[keep[port]] = output
            else:
                output.release()
        return answer

    def prepare(self, kernel, inputs, parameters=None, deadline_ms=None, request_id=None, **fields):
        specs = {port: strait.Spec(x["dtype"], x["shape"]) for port, x in inputs.items() if "dtype" in x}
        fixed = {port: self.handles[x["handle"]] if isinstance(x, dict) else x for port, x in inputs.items() if port not in specs}
        made = self.session.prepare(
            kernel, inputs=specs, fixed=fixed, parameters=parameters, deadline=seconds(deadline_ms), request_id=request_id
        )
        self.prepared[fields["as"]] = made
        return {"inputs": ports(made.inputs), "outputs": ports(made.outputs)}

    def call_prepared(self, prepared, inputs, files=None, cancel_after_ms=None, repeat=1):
        prepared = self.prepared[prepared]
        order = [port for port in prepared.inputs if port in inputs]
        given = [self.handles[inputs[port]["handle"]] for port in [*order, *(port for port in inputs if port not in order)]]
        before = self.session.client_stats().copied_bytes
        times, result = [], None
        for _ in range(repeat):
            if cancel_after_ms is not None:
                threading.Timer(cancel_after_ms / 1000, prepared.cancel).start()
            start = time.perf_counter()
            result = prepared(*given)
            times.append(time.perf_counter() - start)
        copied = self.session.client_stats().copied_bytes - before
        outputs = {next(iter(prepared.outputs)): result} if isinstance(result, np.ndarray) else result
        for port, file in (files or {}).items():
            write(outputs[port], file)
        return {
            "outputs": {port: {**array(output), "dtype": prepared.outputs[port].dtype} for port, output in outputs.items()},
            "notes": [{"key": key, "text": text} for key, text in prepared.notes.items()],
            "client_copied_bytes": copied,
            "seconds": times,
        }

    def close_prepared(self, prepared):
        self.prepared.pop(prepared).close()
        return {}

    def channel_produce(self, kernel, channel, inputs, rows, cuts, end="last", deadline_ms=None, **options):
        given = {port: np.asarray(self.handles[x["handle"]]) for port, x in inputs.items()}
        specs = {port: strait.Spec(array(self.handles[x["handle"]])["dtype"], (rows, *given[port].shape[1:])) for port, x in inputs.items()}
        channel = strait.ChannelOptions(
            channel["name"], channel.get("batches"), seconds(channel.get("wait_ms")), seconds(channel.get("resume_ms"))
        )
        stream = self.session.prepare_stream(kernel, inputs=specs, channel=channel, deadline=seconds(deadline_ms), **options)
        try:
            if not cuts and end == "last":
                cuts = [0]
            start = 0
            for index, cut in enumerate(cuts):
                send = stream.last if end == "last" and index == len(cuts) - 1 else stream.chunk
                send(**{port: x[start : start + cut] for port, x in given.items()})
                start += cut
        except BaseException:
            stream.close()
            raise
        if end == "keep":
            self.kept.append(stream)
        else:
            stream.close()
        return {"chunks": len(cuts)}

    def channel_read(self, channel, batches=None, acknowledge=False, files=None, keep=False, request_id=None):
        reader = self.session.read_channel(channel, request_id=request_id)
        try:
            numbers, came, ended = [], {port: [] for port in reader.outputs}, False
            while len(numbers) != batches:
                batch = next(reader, None)
                if batch is None:
                    ended = True
                    break
                numbers.append(reader.number)
                for port, rows in (batch if isinstance(batch, dict) else {next(iter(reader.outputs)): batch}).items():
                    came[port].append(len(rows))
                    if port in (files or {}):
                        write(rows, files[port], "ab")
            if acknowledge:
                reader.acknowledge()
        except BaseException:
            reader.close()
            raise
        if keep:
            self.kept.append(reader)
        else:
            reader.close()
        return {
            "kernel": reader.kernel,
            "outputs": ports(reader.outputs),
            "numbers": numbers,
            "rows": came,
            "ended": ended,
            "notes": [{"key": key, "text": text} for key, text in reader.notes.items()],
        }

    def concurrent(self, calls, repeat=1):
        answers = [None] * len(calls)

        def run(index):
            for _ in range(repeat):
                answers[index] = attempt(lambda: self.call(**calls[index]))
                if not answers[index]["ok"]:
                    return

        threads = [threading.Thread(target=run, args=(index,)) for index in range(len(calls))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return {"answers": answers}

    def delete(self, name):
        self.session.delete(name)
        return {}

    def list(self):
        return {
            "flights": [
                {
                    "name": flight.name,
                    "tensors": [{"name": t.name, "dtype": t.dtype, "shape": list(t.shape)} for t in flight.tensors],
                }
                for flight in self.session.list()
            ]
        }

    def kernels(self):
        return {
            "kernels": [
                {
                    "name": kernel.name,
                    "plugin": kernel.plugin,
                    "doc": kernel.doc,
                    "inputs": [port.name for port in kernel.inputs],
                    "outputs": [port.name for port in kernel.outputs],
                    "parameters": [parameter.name for parameter in kernel.parameters],
                }
                for kernel in self.session.kernels()
            ]
        }

    def stats(self):
        return {"stats": self.session.stats()}

    def client_stats(self):
        stats = self.session.client_stats()
        return {"copied_bytes": stats.copied_bytes, "calls": stats.calls, "mappings": stats.mappings}

    def renew(self, handle, lease_ms=None):
        return {"expires_ms": round(self.handles[handle].renew(seconds(lease_ms)) * 1000)}

    def release(self, handle):
        if isinstance(self.handles[handle], strait.Array):
            self.handles[handle].release()
        else:
            del self.handles[handle]
        return {}

    def forget(self, handle):
        del self.handles[handle]
        gc.collect()
        return {}

    def fork(self):
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(writing, json.dumps(attempt(self.list)).encode())
            os._exit(0)
        os.close(writing)
        with open(reading, "rb") as pipe:
            answer = json.loads(pipe.read())
        os.waitpid(child, 0)
        return {"child": answer}


def seconds(milliseconds):
    return None if milliseconds is None else milliseconds / 1000


def array(x):
    dtype = x.dtype_name if isinstance(x, strait.Array) else {"bool": "bool8"}.get(x.dtype.name, x.dtype.name)
    return {"dtype": dtype, "shape": list(x.shape), "bytes": x.nbytes, **place(x)}


def place(x):
    """What Linux says about the memory of an array's first element."""
    address = np.asarray(x).__array_interface__["data"][0]
    with open("/proc/self/maps") as maps:
        for line in maps if x.size else ():
            first, last = (int(number, 16) for number in line.split()[0].split("-"))
            if first <= address < last:
                major, minor = (int(number, 16) for number in line.split()[3].split(":"))
                inode = int(line.split()[4])
                return {"device": (major << 8 | minor) if inode else 0, "inode": inode}
    return {"device": 0, "inode": 0}


def ports(specs):
    return [{"port": port, "dtype": spec.dtype, "shape": list(spec.shape)} for port, spec in specs.items()]


def write(x, file, mode="wb"):
    with open(file, mode) as out:
        out.write(np.asarray(x).tobytes())


def attempt(work):
    try:
        return {"ok": True, **work()}
    except strait.RemoteError as error:
        kind = "lease_expired" if isinstance(error, strait.LeaseExpiredError) else "remote"
        answer = {"ok": False, "kind": kind, "message": error.message, "code": error.code}
        answer.update(reason=error.reason, request_id=error.request_id)
        if error.backtrace is not None:
            answer["backtrace"] = error.backtrace
        if error.details:
            answer["details"] = dict(error.details)
        return answer
    except (strait.StraitError, TypeError, ValueError) as error:
        kinds = {
            strait.DisconnectedError: "disconnected",
            strait.NoHostError: "no_host",
            strait.ReleasedError: "released",
            strait.ForkedError: "forked",
        }
        return {"ok": False, "kind": kinds.get(type(error), "argument"), "message": str(error)}
    except Exception as error:
        return {"ok": False, "kind": "driver", "message": repr(error)}


def main():
    driver = Driver()
    for line in sys.stdin:
        request = json.loads(line)
        op = request.pop("op")
        answer = {"ok": True} if op == "exit" else attempt(lambda: getattr(driver, op)(**request))
        print(json.dumps(answer), flush=True)
        if op == "exit":
            return


if __name__ == "__main__":
    main()
