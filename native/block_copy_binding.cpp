// One call copies a whole list of blocks; everything is checked before the first byte moves, and the interpreter lock is free meanwhile.
#include "block_copy_binding.h"

#include <cerrno>
#include <string>

#include "block_copy.h"
#include "block_stream.h"
#include "xxh3_wide.h"

namespace py = pybind11;

namespace polyphase {
namespace {

// A flat buffer, held for as long as this lives: its owner cannot free or resize it under the copy.
class Bytes {
public:
    Bytes(py::handle object, const char* name, int flags) {
        if (PyObject_GetBuffer(object.ptr(), &view_, PyBUF_C_CONTIGUOUS | flags) != 0) {
            PyErr_Clear();
            throw py::value_error(std::string(name) + " must be a contiguous" + (flags == PyBUF_WRITABLE ? ", writable" : "") + " buffer");
        }
    }
    ~Bytes() { PyBuffer_Release(&view_); }
    Bytes(const Bytes&) = delete;
    Bytes& operator=(const Bytes&) = delete;

    unsigned char* data() const { return static_cast<unsigned char*>(view_.buf); }
    size_t size() const { return static_cast<size_t>(view_.len); }

private:
    Py_buffer view_{};
};

class Words {
public:
    Words(py::handle object, const char* name, int flags = PyBUF_SIMPLE) : bytes_(object, name, flags) {
        if (bytes_.size() % 8 != 0 || (bytes_.size() != 0 && reinterpret_cast<uintptr_t>(bytes_.data()) % 8 != 0)) {
            throw py::value_error(std::string(name) + " must hold aligned 64-bit words");
        }
    }
    const uint64_t* data() const { return reinterpret_cast<const uint64_t*>(bytes_.data()); }
    size_t size() const { return bytes_.size() / 8; }

private:
    Bytes bytes_;
};

void check_ids(const Words& ids, size_t memory_bytes, size_t block_bytes, const char* name) {
    const size_t block_count = memory_bytes / block_bytes;
    for (size_t i = 0; i < ids.size(); ++i) {
        if (ids.data()[i] >= block_count) {
            throw py::value_error(std::string(name) + ": block " + std::to_string(ids.data()[i]) + " does not exist; there are " + std::to_string(block_count));
        }
    }
}

size_t copy(py::handle target, py::handle target_ids, py::handle source, py::handle source_ids, size_t block_bytes, py::handle generations,
            py::handle expected, py::handle verdicts, py::handle stop) {
    if (block_bytes == 0) throw py::value_error("block_bytes is 0");
    const Bytes to(target, "target", PyBUF_WRITABLE), from(source, "source", PyBUF_SIMPLE);
    const Words to_ids(target_ids, "target_ids"), from_ids(source_ids, "source_ids");
    const Words present(generations, "generations"), wanted(expected, "expected");
    const Bytes out(verdicts, "verdicts", PyBUF_WRITABLE), flag(stop, "stop", PyBUF_SIMPLE);
    const size_t count = to_ids.size();
    if (from_ids.size() != count || out.size() != count || flag.size() < 1) {
        throw py::value_error("there must be as many source_ids and verdicts as target_ids, and one byte of stop");
    }
    check_ids(to_ids, to.size(), block_bytes, "target");
    check_ids(from_ids, from.size(), block_bytes, "source");
    const bool compares = present.size() != 0;
    if (compares && (wanted.size() != count || present.size() < from.size() / block_bytes)) {
        throw py::value_error("there must be one generation for each source block and one expected for each copied one");
    }
    const BlockCopy job{to.data(),   from.data(), to_ids.data(), from_ids.data(), count, block_bytes, compares ? present.data() : nullptr,
                        wanted.data(), out.data(),  flag.data()};
    const py::gil_scoped_release others_may_run;
    return copy_blocks(job);
}

// Returns the sums as little-endian words, or how the stream ended early: "late" or "closed". Raises OSError for the rest.
py::object stream(py::handle memory, py::handle ids, size_t block_bytes, int fd, int64_t deadline_ns, bool sends) {
    if (block_bytes == 0) throw py::value_error("block_bytes is 0");
    const Bytes bytes(memory, "memory", sends ? PyBUF_SIMPLE : PyBUF_WRITABLE);
    const Words which(ids, "ids");
    check_ids(which, bytes.size(), block_bytes, "memory");
    std::string sums(which.size() * 8, '\0');
    StreamEnd end;
    int failure = 0;
    {
        const py::gil_scoped_release others_may_run;
        const BlockStream job{fd, bytes.data(), which.data(), which.size(), block_bytes, deadline_ns, reinterpret_cast<uint64_t*>(sums.data())};
        end = sends ? send_blocks(job) : receive_blocks(job);
        failure = errno;
    }
    switch (end) {
        case StreamEnd::kDone: return py::bytes(sums);
        case StreamEnd::kLate: return py::str("late");
        case StreamEnd::kClosed: return py::str("closed");
        case StreamEnd::kFailed: break;
    }
    errno = failure;
    PyErr_SetFromErrno(PyExc_OSError);
    throw py::error_already_set();
}

py::int_ sum(py::handle data) {
    const Bytes bytes(data, "data", PyBUF_SIMPLE);
    return py::int_(xxh3_64_wide(bytes.data(), bytes.size()));
}

}  // namespace

void bind_block_copy(py::module_& module) {
    module.def("copy_blocks", &copy, py::arg("target"), py::arg("target_ids"), py::arg("source"), py::arg("source_ids"), py::arg("block_bytes"),
               py::arg("generations"), py::arg("expected"), py::arg("verdicts"), py::arg("stop"));
    module.def("stream_blocks", &stream, py::arg("memory"), py::arg("ids"), py::arg("block_bytes"), py::arg("fd"), py::arg("deadline_ns"), py::arg("sends"));
    module.def("sum_block", &sum, py::arg("data"));
    module.def("copy_method", &copy_method);
}

}  // namespace polyphase
