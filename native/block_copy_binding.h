// What Python sees of the block copy.
#pragma once

#include <pybind11/pybind11.h>

namespace polyphase {

void bind_block_copy(pybind11::module_& module);

}  // namespace polyphase
