// Reading many Python ints quickly. An int of one machine word is read in place where the interpreter's layout is known; everything
// else goes through the C API, which also makes the errors.
#pragma once

#include <Python.h>

#include <cstddef>
#include <cstdint>

namespace polyphase {

#if PY_VERSION_HEX < 0x030C0000
inline Py_ssize_t signed_digit_count(PyObject* number) { return Py_SIZE(number); }
inline const digit* digits_of(PyObject* number) { return reinterpret_cast<PyLongObject*>(number)->ob_digit; }
constexpr bool kLayoutKnown = PyLong_SHIFT == 30;
#elif PY_VERSION_HEX < 0x030F0000
inline Py_ssize_t signed_digit_count(PyObject* number) {
    const uintptr_t tag = reinterpret_cast<PyLongObject*>(number)->long_value.lv_tag;  // digits << 3 | sign: 0 positive, 1 zero, 2 negative
    return (tag & 3) == 2 ? -1 : static_cast<Py_ssize_t>(tag >> 3);
}
inline const digit* digits_of(PyObject* number) { return reinterpret_cast<PyLongObject*>(number)->long_value.ob_digit; }
constexpr bool kLayoutKnown = PyLong_SHIFT == 30;
#else
inline Py_ssize_t signed_digit_count(PyObject*) { return -1; }
inline const digit* digits_of(PyObject*) { return nullptr; }
constexpr bool kLayoutKnown = false;
#endif

// Returns false with a Python error set: TypeError for what is no int, OverflowError for what does not fit.
inline bool read_u64(PyObject* number, uint64_t& word) {
    if (__builtin_expect(kLayoutKnown && PyLong_CheckExact(number), 1)) {
        const Py_ssize_t count = signed_digit_count(number);
        const digit* digits = digits_of(number);
        if (__builtin_expect(count == 3 && digits[2] < 16, 1)) {
            word = digits[0] | static_cast<uint64_t>(digits[1]) << 30 | static_cast<uint64_t>(digits[2]) << 60;
            return true;
        }
        if (count == 2) {
            word = digits[0] | static_cast<uint64_t>(digits[1]) << 30;
            return true;
        }
        if (count == 1) {
            word = digits[0];
            return true;
        }
    }
    word = PyLong_AsUnsignedLongLong(number);
    return word != UINT64_MAX || PyErr_Occurred() == nullptr;
}

// An int in [1, 2**30). Returns false, without an error, for any other.
inline bool read_short(PyObject* number, uint32_t& word) {
    if (!kLayoutKnown || !PyLong_CheckExact(number) || signed_digit_count(number) != 1) return false;
    word = digits_of(number)[0];
    return true;
}

inline bool read_u32(PyObject* number, uint32_t& word) {
    if (read_short(number, word)) return true;
    uint64_t wide = 0;
    if (!read_u64(number, wide)) return false;
    if (wide > UINT32_MAX) {
        PyErr_SetString(PyExc_OverflowError, "a token id does not fit into 32 bits");
        return false;
    }
    word = static_cast<uint32_t>(wide);
    return true;
}

}  // namespace polyphase
