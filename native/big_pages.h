// Memory for large tables that are read at random: asks for big pages, without which each read would first look up its page.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace polyphase {

template <class T>
struct BigPageAllocator {
    using value_type = T;
    static constexpr size_t kPageBytes = size_t{2} << 20;

    BigPageAllocator() = default;
    template <class Other>
    explicit BigPageAllocator(const BigPageAllocator<Other>&) {}

    T* allocate(size_t count) {
        const size_t bytes = count * sizeof(T);
        if (bytes < kPageBytes) return static_cast<T*>(::operator new(bytes));
        void* memory = std::aligned_alloc(kPageBytes, (bytes + kPageBytes - 1) / kPageBytes * kPageBytes);
        if (memory == nullptr) throw std::bad_alloc();
#if defined(__linux__)
        madvise(memory, bytes, MADV_HUGEPAGE);  // a wish; refused, everything works
#endif
        return static_cast<T*>(memory);
    }
    void deallocate(T* memory, size_t count) {
        if (count * sizeof(T) < kPageBytes) {
            ::operator delete(memory);
        } else {
            std::free(memory);
        }
    }
    template <class Other>
    bool operator==(const BigPageAllocator<Other>&) const {
        return true;
    }
    template <class Other>
    bool operator!=(const BigPageAllocator<Other>&) const {
        return false;
    }
};

}  // namespace polyphase
