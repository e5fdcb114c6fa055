// Finds races on shared memory, in whatever order the threads run: two threads touch the same place,
// one of them writes, and nothing between orders them. What orders threads is __syncthreads, and
// __syncwarp inside a warp; other collectives do not. An asynchronous copy writes at any time from
// its start until the thread that started it has waited for it, and then counts as that thread's
// write.
//
// races.cpp keeps the books. The launchers' file is compiled for a thread sanitizer, whose functions,
// called at every access to memory, stand there too.
#pragma once

namespace emulation {

// cp.async of 16 bytes. From its start until it is waited for the target holds NaN or, so that a read
// by others before the start would show as well, what is copied.
struct Copy {
  void* target;
  const void* source;  // NULL: zeros

  void begin(bool at_once) const;
  void end() const;
};

}  // namespace emulation
