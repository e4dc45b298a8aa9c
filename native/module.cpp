// polyphase.core._native: what Python sees of the hashing and of the prefix index. Bulk calls only: one call takes all ids of a prompt
// or all hashes of an event, as a list or as a buffer of machine words.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "block_copy_binding.h"
#include "columns.h"
#include "hashing.h"
#include "prefix_index.h"
#include "python_numbers.h"

namespace py = pybind11;

namespace polyphase {
namespace {

// A contiguous buffer of 4- or 8-byte integers, if the object offers one.
class IntegerBuffer {
public:
    IntegerBuffer(PyObject* object, size_t item_bytes) {
        if (PyList_CheckExact(object) || PyTuple_CheckExact(object) || !PyObject_CheckBuffer(object)) return;
        if (PyObject_GetBuffer(object, &view_, PyBUF_ND | PyBUF_FORMAT) != 0) {
            PyErr_Clear();
            return;
        }
        const char* format = view_.format == nullptr ? "B" : view_.format;
        if (*format == '<' || *format == '=' || *format == '@') ++format;
        const bool is_integer = *format != '\0' && format[1] == '\0' && std::strchr("iIlLqQ", *format) != nullptr;
        usable_ = is_integer && view_.ndim == 1 && static_cast<size_t>(view_.itemsize) == item_bytes;
        is_signed_ = *format >= 'a';
    }
    ~IntegerBuffer() {
        if (view_.obj != nullptr) PyBuffer_Release(&view_);
    }
    IntegerBuffer(const IntegerBuffer&) = delete;
    IntegerBuffer& operator=(const IntegerBuffer&) = delete;

    bool usable() const { return usable_; }
    bool is_signed() const { return is_signed_; }
    size_t size() const { return static_cast<size_t>(view_.len / view_.itemsize); }
    template <class Word>
    const Word* words() const {
        return static_cast<const Word*>(view_.buf);
    }

private:
    Py_buffer view_{};
    bool usable_ = false;
    bool is_signed_ = false;
};

py::object as_sequence(py::handle object) {
    auto sequence = py::reinterpret_steal<py::object>(PySequence_Fast(object.ptr(), "a sequence of ints was expected"));
    if (!sequence) throw py::error_already_set();
    return sequence;
}

py::list as_list(const std::vector<uint64_t>& words) {
    auto list = py::reinterpret_steal<py::list>(PyList_New(static_cast<Py_ssize_t>(words.size())));
    if (!list) throw py::error_already_set();
    for (size_t i = 0; i < words.size(); ++i) {
        PyObject* number = PyLong_FromUnsignedLongLong(words[i]);
        if (number == nullptr) throw py::error_already_set();
        PyList_SET_ITEM(list.ptr(), static_cast<Py_ssize_t>(i), number);
    }
    return list;
}

// Hashing

[[noreturn]] void throw_out_of_range() {
    PyErr_SetString(PyExc_OverflowError, "a token id does not fit into 32 bits, or is negative");
    throw py::error_already_set();
}

struct Hashes {
    std::vector<uint64_t> blocks, sequences;
};

// Content hashes of media, each with the block that it lies in; in order.
using Extras = std::vector<std::pair<size_t, uint64_t>>;

struct Recipe {
    size_t block_size;
    uint64_t seed;
    std::optional<uint64_t> parent = std::nullopt;
    Extras extras = {};
};

Hashes hash_packed(const uint32_t* tokens, size_t token_count, const Recipe& recipe, bool chained) {
    Hashes hashes;
    const size_t block_size = recipe.block_size;
    const size_t block_count = token_count / block_size;
    hashes.blocks.resize(block_count);
    hash_blocks(tokens, block_count, block_size, recipe.seed, hashes.blocks.data());
    std::vector<unsigned char> data;
    for (auto extra = recipe.extras.begin(); extra != recipe.extras.end();) {
        const size_t block = extra->first;
        if (block >= block_count) break;
        data.resize(4 * block_size);
        std::memcpy(data.data(), tokens + block * block_size, 4 * block_size);
        for (; extra != recipe.extras.end() && extra->first == block; ++extra) {
            const auto* bytes = reinterpret_cast<const unsigned char*>(&extra->second);
            data.insert(data.end(), bytes, bytes + sizeof extra->second);
        }
        hashes.blocks[block] = xxh3_64(data.data(), data.size(), recipe.seed);
    }
    if (chained) {
        hashes.sequences.resize(block_count);
        hash_sequences(hashes.blocks.data(), block_count, recipe.parent ? &*recipe.parent : nullptr, hashes.sequences.data());
    }
    return hashes;
}

Hashes hash(py::handle token_ids, const Recipe& recipe, bool chained) {
    if (recipe.block_size == 0) throw py::value_error("block_size is 0; a block has at least one token");
    const IntegerBuffer buffer(token_ids.ptr(), sizeof(uint32_t));
    if (buffer.usable()) {
        const uint32_t* tokens = buffer.words<uint32_t>();
        if (buffer.is_signed()) {
            uint32_t all = 0;
            for (size_t i = 0; i < buffer.size(); ++i) all |= tokens[i];
            if (all >> 31 != 0) throw_out_of_range();
        }
        const py::gil_scoped_release others_may_run;
        return hash_packed(tokens, buffer.size(), recipe, chained);
    }
    const IntegerBuffer wide(token_ids.ptr(), sizeof(uint64_t));
    std::vector<uint32_t> tokens;
    if (wide.usable()) {
        tokens.resize(wide.size());
        for (size_t i = 0; i < tokens.size(); ++i) {
            const uint64_t token = wide.words<uint64_t>()[i];
            if (token > UINT32_MAX) throw_out_of_range();
            tokens[i] = static_cast<uint32_t>(token);
        }
        return hash_packed(tokens.data(), tokens.size(), recipe, chained);
    }
    const py::object sequence = as_sequence(token_ids);
    PyObject** items = PySequence_Fast_ITEMS(sequence.ptr());
    tokens.resize(static_cast<size_t>(PySequence_Fast_GET_SIZE(sequence.ptr())));
    for (size_t i = 0; i < tokens.size(); ++i) {
        if (!read_u32(items[i], tokens[i])) throw py::error_already_set();
    }
    return hash_packed(tokens.data(), tokens.size(), recipe, chained);
}

py::list block_hashes(py::handle token_ids, size_t block_size, uint64_t seed) {
    return as_list(hash(token_ids, Recipe{block_size, seed}, false).blocks);
}

py::list sequence_hashes(py::handle token_ids, size_t block_size, uint64_t seed, std::optional<uint64_t> parent) {
    return as_list(hash(token_ids, Recipe{block_size, seed, parent}, true).sequences);
}

py::tuple hash_tokens(py::handle token_ids, size_t block_size, uint64_t seed, std::optional<uint64_t> parent, std::optional<Extras> extras) {
    const Hashes hashes = hash(token_ids, Recipe{block_size, seed, parent, extras ? std::move(*extras) : Extras()}, true);
    return py::make_tuple(as_list(hashes.blocks), as_list(hashes.sequences));
}

// The index

// A prompt's hashes; those of a list are converted where the match asks for them.
class PromptChain final : public Chain {
public:
    explicit PromptChain(py::handle hashes) : buffer_(hashes.ptr(), sizeof(uint64_t)) {
        if (buffer_.usable() && !buffer_.is_signed()) {
            size_ = buffer_.size();
            words_ = buffer_.words<uint64_t>();
            return;
        }
        sequence_ = as_sequence(hashes);
        size_ = static_cast<size_t>(PySequence_Fast_GET_SIZE(sequence_.ptr()));
        converted_.reset(new uint64_t[size_]);
        words_ = converted_.get();
    }

    size_t size() const override { return size_; }

    uint64_t at(size_t place) override {
        if (!converted_) return words_[place];
        uint64_t word = 0;
        if (!read_u64(PySequence_Fast_ITEMS(sequence_.ptr())[place], word)) throw py::error_already_set();
        return word;
    }

    const uint64_t* range(size_t begin, size_t end) override {
        if (converted_) {
            PyObject* const* items = PySequence_Fast_ITEMS(sequence_.ptr());
            uint64_t* const words = converted_.get();
            for (size_t i = begin; i < end; ++i) {
                if (!read_u64(items[i], words[i])) throw py::error_already_set();
            }
        }
        return words_ + begin;
    }

private:
    IntegerBuffer buffer_;
    py::object sequence_;
    std::unique_ptr<uint64_t[]> converted_;
    const uint64_t* words_ = nullptr;
    size_t size_ = 0;
};

uint64_t digest_sum(py::handle hashes) {
    PromptChain chain(hashes);
    return sum_of_mixed(chain.range(0, chain.size()), chain.size());
}

constexpr uint32_t kUnknown = UINT32_MAX;

// Workers' names and numbers. A copy is made before a change if an answer still refers to them.
struct Names {
    py::dict numbers;
    std::vector<py::object> names;  // None where a number is free
    std::vector<uint32_t> free;
    // Numbers of the workers in tuples that were asked for lately: a router asks for the same line-up again and again.
    mutable std::vector<std::pair<py::object, std::vector<uint32_t>>> line_ups;

    uint32_t number_of(PyObject* worker) const {
        PyObject* number = PyDict_GetItemWithError(numbers.ptr(), worker);
        if (number != nullptr) return static_cast<uint32_t>(PyLong_AsUnsignedLong(number));
        if (PyErr_Occurred() != nullptr) throw py::error_already_set();
        return kUnknown;
    }

    std::vector<uint32_t> numbers_of(py::handle workers) const {
        const py::object sequence = as_sequence(workers);
        std::vector<uint32_t> found(static_cast<size_t>(PySequence_Fast_GET_SIZE(sequence.ptr())));
        for (size_t i = 0; i < found.size(); ++i) found[i] = number_of(PySequence_Fast_ITEMS(sequence.ptr())[i]);
        return found;
    }

    const std::vector<uint32_t>& line_up(const py::object& workers) const {
        for (const auto& known : line_ups) {
            if (known.first.is(workers)) return known.second;
        }
        if (line_ups.size() >= 8) line_ups.clear();
        line_ups.emplace_back(workers, numbers_of(workers));
        return line_ups.back().second;
    }
};

// `tier` is a polyphase.wire.events.Tier, which is a str.
size_t tier_number(py::handle tier) {
    static const char* const kNames[kTierCount] = {"device", "host", "disk", "object"};
    for (size_t number = 0; PyUnicode_Check(tier.ptr()) && number < kTierCount; ++number) {
        if (PyUnicode_CompareWithASCIIString(tier.ptr(), kNames[number]) == 0) return number;
    }
    throw py::value_error("there is no such tier; there are device, host, disk and object");
}

class Overlaps {
public:
    Overlaps(std::shared_ptr<const Names> names, Depths depths) : names_(std::move(names)), depths_(std::move(depths)) {}

    uint32_t depth(py::handle worker, py::handle tier) const {
        const uint32_t number = names_->number_of(worker.ptr());
        return number == kUnknown ? 0 : depths_.of(tier_number(tier), number);
    }

    py::list depths(const py::object& workers, py::handle tier) const {
        const size_t level = tier_number(tier);
        const auto same = [](uint32_t depth) { return uint64_t{depth}; };
        if (PyTuple_CheckExact(workers.ptr())) return figures_of(names_->line_up(workers), level, same);
        return figures_of(names_->numbers_of(workers), level, same);
    }

    py::object tokens_beyond(const py::object& workers, uint64_t block_size, uint64_t token_count, uint64_t at_least, py::handle tier) const {
        const size_t level = tier_number(tier);
        const auto column_of = [&](const std::vector<uint32_t>& numbers) {
            return make_column(numbers.size(), [&](double* column) {
                for (size_t i = 0; i < numbers.size(); ++i) {
                    const uint64_t held = numbers[i] == kUnknown ? 0 : depths_.of(level, numbers[i]) * block_size;
                    column[i] = static_cast<double>(held < token_count && token_count - held > at_least ? token_count - held : at_least);
                }
            });
        };
        if (PyTuple_CheckExact(workers.ptr())) return column_of(names_->line_up(workers));
        return column_of(names_->numbers_of(workers));
    }

    size_t level_count() const { return depths_.level_count; }

    py::dict as_dict(py::handle tier) const {
        const size_t level = tier_number(tier);
        py::dict found;
        for (size_t worker = 0; worker < depths_.worker_count; ++worker) {
            if (const uint32_t depth = depths_.of(level, worker)) found[names_->names[worker]] = depth;
        }
        return found;
    }

private:
    template <class Figure>
    py::list figures_of(const std::vector<uint32_t>& numbers, size_t level, Figure&& figure) const {
        auto list = py::reinterpret_steal<py::list>(PyList_New(static_cast<Py_ssize_t>(numbers.size())));
        if (!list) throw py::error_already_set();
        for (size_t i = 0; i < numbers.size(); ++i) {
            PyObject* number = PyLong_FromUnsignedLongLong(figure(numbers[i] == kUnknown ? 0 : depths_.of(level, numbers[i])));
            if (number == nullptr) throw py::error_already_set();
            PyList_SET_ITEM(list.ptr(), static_cast<Py_ssize_t>(i), number);
        }
        return list;
    }

    std::shared_ptr<const Names> names_;
    Depths depths_;
};

class Index {
public:
    explicit Index(size_t capacity) : names_(std::make_shared<Names>()), index_(capacity) {
        if (capacity == 0) throw py::value_error("the capacity is 0 blocks; an index holds at least one");
    }

    void store(py::handle worker, py::handle hashes, py::handle tier) {
        const size_t level = tier_number(tier);
        PromptChain chain(hashes);
        const uint64_t* words = chain.range(0, chain.size());
        index_.store(number_for(worker), level, words, chain.size());
    }

    void remove(py::handle worker, py::handle hashes, py::handle tier) {
        const size_t level = tier_number(tier);
        PromptChain chain(hashes);
        const uint64_t* words = chain.range(0, chain.size());
        const uint32_t number = names_->number_of(worker.ptr());
        if (number != kUnknown) index_.remove(number, level, words, chain.size());
    }

    void clear(py::handle worker) {
        const uint32_t number = names_->number_of(worker.ptr());
        if (number == kUnknown) return;
        index_.clear(number);
        change_names();
        if (PyDict_DelItem(names_->numbers.ptr(), worker.ptr()) != 0) throw py::error_already_set();
        names_->names[number] = py::none();
        names_->free.push_back(number);
    }

    Overlaps match(py::handle hashes) {
        PromptChain chain(hashes);
        Depths depths;
        index_.match(chain, depths);
        return Overlaps(names_, std::move(depths));
    }

    size_t block_count(py::handle worker, py::handle tier) const {
        const size_t level = tier_number(tier);
        const uint32_t number = names_->number_of(worker.ptr());
        return number == kUnknown ? 0 : index_.held(number, level);
    }

    py::tuple digest(py::handle worker, py::handle tier) const {
        const size_t level = tier_number(tier);
        const uint32_t number = names_->number_of(worker.ptr());
        const Told told = number == kUnknown ? Told() : index_.told(number, level);
        return py::make_tuple(told.count, told.sum);
    }

    const PrefixIndex& core() const { return index_; }

private:
    uint32_t number_for(py::handle worker) {
        uint32_t number = names_->number_of(worker.ptr());
        if (number != kUnknown) return number;
        change_names();
        if (names_->free.empty()) {
            number = static_cast<uint32_t>(names_->names.size());
            names_->names.push_back(py::reinterpret_borrow<py::object>(worker));
        } else {
            number = names_->free.back();
            names_->free.pop_back();
            names_->names[number] = py::reinterpret_borrow<py::object>(worker);
        }
        names_->numbers[worker] = number;
        return number;
    }

    void change_names() {
        names_->line_ups.clear();
        if (names_.use_count() == 1) return;
        auto copy = std::make_shared<Names>(*names_);
        copy->numbers = py::reinterpret_steal<py::dict>(PyDict_Copy(names_->numbers.ptr()));
        names_ = std::move(copy);
    }

    std::shared_ptr<Names> names_;
    PrefixIndex index_;
};

}  // namespace

PYBIND11_MODULE(_native, module) {
    module.doc() = "Block hashing, the prefix index and the block copy in C++; polyphase.core.native says whether it is in use.";
    module.attr("RECIPE") = 5;  // raised with every change that the Python side must know of

    bind_block_copy(module);

    module.def("block_hashes", &block_hashes, py::arg("token_ids"), py::arg("block_size"), py::arg("seed"));
    module.def("sequence_hashes", &sequence_hashes, py::arg("token_ids"), py::arg("block_size"), py::arg("seed"), py::arg("parent") = py::none());
    module.def("hash_tokens", &hash_tokens, py::arg("token_ids"), py::arg("block_size"), py::arg("seed"), py::arg("parent") = py::none(),
               py::arg("extras") = py::none());
    module.def("xxh3_64", [](const py::bytes& data, uint64_t seed) {
        const std::string_view view(data);
        return xxh3_64(view.data(), view.size(), seed);
    }, py::arg("data"), py::arg("seed"));

    module.def("scores_of", &scores_of, py::arg("count"), py::arg("columns"), py::arg("weights"), py::arg("rows"));
    module.def("best_row", &best_row, py::arg("scores"), py::arg("last_turns"), py::arg("rows"));
    module.def("digest_sum", &digest_sum, py::arg("sequence_hashes"));

    py::class_<Overlaps>(module, "Overlaps")
        .def("depth", &Overlaps::depth, py::arg("worker_id"), py::arg("tier") = "device")
        .def("depths", &Overlaps::depths, py::arg("worker_ids"), py::arg("tier") = "device")
        .def("tokens_beyond", &Overlaps::tokens_beyond, py::arg("worker_ids"), py::arg("block_size"), py::arg("token_count"),
             py::arg("at_least") = 0, py::arg("tier") = "device")
        .def_property_readonly("level_count", &Overlaps::level_count)
        .def("as_dict", &Overlaps::as_dict, py::arg("tier") = "device");

    py::class_<Index>(module, "Index")
        .def(py::init<size_t>(), py::arg("capacity"))
        .def("store", &Index::store, py::arg("worker_id"), py::arg("hashes"), py::arg("tier") = "device")
        .def("remove", &Index::remove, py::arg("worker_id"), py::arg("hashes"), py::arg("tier") = "device")
        .def("clear", &Index::clear, py::arg("worker_id"))
        .def("match", &Index::match, py::arg("hashes"))
        .def("block_count", &Index::block_count, py::arg("worker_id"), py::arg("tier") = "device")
        .def("digest", &Index::digest, py::arg("worker_id"), py::arg("tier") = "device")
        .def("check", [](const Index& index) { index.core().check(); })
        .def_property_readonly("kind", [](const Index&) { return "native"; })
        .def_property_readonly("capacity", [](const Index& index) { return index.core().capacity(); })
        .def_property_readonly("size", [](const Index& index) { return index.core().size(); })
        .def_property_readonly("run_count", [](const Index& index) { return index.core().run_count(); })
        .def_property_readonly("forgotten", [](const Index& index) { return index.core().forgotten(); })
        .def_property_readonly("heap_bytes", [](const Index& index) { return index.core().heap_bytes(); });
}

}  // namespace polyphase
