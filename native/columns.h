// Arithmetic on columns of doubles, a row per worker: what polyphase.router.columns does in Python, with the same result to the last bit.
#pragma once

#include <pybind11/pybind11.h>

#include <cstring>
#include <vector>

#include "python_numbers.h"

namespace polyphase {

namespace py = pybind11;

inline double as_double(PyObject* number) {
    if (PyFloat_CheckExact(number)) return PyFloat_AS_DOUBLE(number);
    uint32_t word = 0;
    if (PyLong_CheckExact(number) && read_short(number, word)) return word;
    const double value = PyFloat_AsDouble(number);
    if (value == -1.0 && PyErr_Occurred() != nullptr) throw py::error_already_set();
    return value;
}

inline Py_ssize_t as_index(PyObject* number) {
    const Py_ssize_t value = PyNumber_AsSsize_t(number, PyExc_IndexError);
    if (value == -1 && PyErr_Occurred() != nullptr) throw py::error_already_set();
    return value;
}

// The numbers of an array in place, those of any other sequence converted. `Code` is the array's type code.
template <class Number, char Code, Number (*Convert)(PyObject*)>
class Numbers {
public:
    explicit Numbers(PyObject* object) {
        if (!PyList_CheckExact(object) && PyObject_CheckBuffer(object)) {
            if (PyObject_GetBuffer(object, &view_, PyBUF_ND | PyBUF_FORMAT) != 0) throw py::error_already_set();
            if (view_.format != nullptr && view_.format[0] == Code && view_.format[1] == '\0' && view_.ndim == 1) {
                data_ = static_cast<const Number*>(view_.buf);
                size_ = static_cast<size_t>(view_.len) / sizeof(Number);
                return;
            }
        }
        const auto sequence = py::reinterpret_steal<py::object>(PySequence_Fast(object, "a sequence of numbers was expected"));
        if (!sequence) throw py::error_already_set();
        size_ = static_cast<size_t>(PySequence_Fast_GET_SIZE(sequence.ptr()));
        converted_.reserve(size_);
        for (size_t i = 0; i < size_; ++i) converted_.push_back(Convert(PySequence_Fast_ITEMS(sequence.ptr())[i]));
        data_ = converted_.data();
    }
    ~Numbers() {
        if (view_.obj != nullptr) PyBuffer_Release(&view_);
    }
    Numbers(const Numbers&) = delete;
    Numbers& operator=(const Numbers&) = delete;

    size_t size() const { return size_; }
    Number operator[](size_t i) const { return data_[i]; }

private:
    Py_buffer view_{};
    std::vector<Number> converted_;
    const Number* data_ = nullptr;
    size_t size_ = 0;
};

inline int64_t as_int64(PyObject* number) { return as_index(number); }

using Doubles = Numbers<double, 'd', as_double>;
using Integers = Numbers<int64_t, 'q', as_int64>;

// An array('d') of Python, filled by `fill(double*)`.
template <class Fill>
py::object make_column(size_t count, Fill&& fill) {
    static PyObject* const array_type = py::object(py::module_::import("array").attr("array")).release().ptr();
    static PyObject* const code = py::str("d").release().ptr();
    const auto bytes = py::reinterpret_steal<py::object>(PyBytes_FromStringAndSize(nullptr, static_cast<Py_ssize_t>(count * sizeof(double))));
    if (!bytes) throw py::error_already_set();
    fill(reinterpret_cast<double*>(PyBytes_AS_STRING(bytes.ptr())));
    PyObject* const arguments[] = {code, bytes.ptr()};
    auto column = py::reinterpret_steal<py::object>(PyObject_Vectorcall(array_type, arguments, 2, nullptr));
    if (!column) throw py::error_already_set();
    return column;
}

// Which rows take part: those given, or all `count`.
class Rows {
public:
    Rows(const py::object& rows, size_t count) : count_(count) {
        if (rows.is_none()) return;
        given_ = true;
        const Integers numbers(rows.ptr());
        rows_.reserve(numbers.size());
        for (size_t i = 0; i < numbers.size(); ++i) {
            if (numbers[i] < 0 || static_cast<size_t>(numbers[i]) >= count) throw py::index_error("there is no such row");
            rows_.push_back(static_cast<size_t>(numbers[i]));
        }
    }
    size_t size() const { return given_ ? rows_.size() : count_; }
    size_t operator[](size_t i) const { return given_ ? rows_[i] : i; }

private:
    std::vector<size_t> rows_;
    size_t count_;
    bool given_ = false;
};

inline py::object scores_of(size_t count, const py::list& columns, const py::list& weights, const py::object& given_rows) {
    if (columns.size() != weights.size()) throw py::value_error("not one weight for each column");
    std::vector<double> costs(count, 0.0);
    for (size_t number = 0; number < columns.size(); ++number) {
        const Doubles column(PyList_GET_ITEM(columns.ptr(), static_cast<Py_ssize_t>(number)));
        if (column.size() != count) throw py::value_error("columns of different lengths");
        const double weight = as_double(PyList_GET_ITEM(weights.ptr(), static_cast<Py_ssize_t>(number)));
        for (size_t row = 0; row < count; ++row) costs[row] += weight * column[row];
    }
    const Rows rows(given_rows, count);
    double lowest = 0.0;
    for (size_t i = 0; i < rows.size(); ++i) {
        if (i == 0 || costs[rows[i]] < lowest) lowest = costs[rows[i]];
    }
    return make_column(count, [&](double* scores) {
        if (rows.size() != count) std::memset(scores, 0, count * sizeof(double));
        for (size_t i = 0; i < rows.size(); ++i) scores[rows[i]] = (lowest + 1.0) / (costs[rows[i]] + 1.0);
    });
}

inline size_t best_row(const py::object& score_column, const py::object& turn_column, const py::object& given_rows) {
    const Doubles scores(score_column.ptr());
    const Integers turns(turn_column.ptr());
    if (turns.size() != scores.size()) throw py::value_error("columns of different lengths");
    const Rows rows(given_rows, scores.size());
    if (rows.size() == 0) throw py::value_error("no row to choose from");
    size_t best = rows[0];
    for (size_t i = 1; i < rows.size(); ++i) {
        const size_t row = rows[i];
        if (scores[row] > scores[best] || (scores[row] == scores[best] && turns[row] < turns[best])) best = row;
    }
    return best;
}

}  // namespace polyphase
