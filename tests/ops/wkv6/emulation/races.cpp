// The books of races.h, and what takes the place of the thread sanitizer's own library. Not compiled
// for the sanitizer itself.
#include "races.h"

#include <cuda_runtime.h>

namespace emulation {
namespace {

enum class Access { read, write, copy_begins, copy_ends };

constexpr size_t CELL_BYTES = 2;

// Who has touched a cell last. Barriers are numbered; a cell's entries are of use while the number of
// the last barrier of the block, or of the warp, is still the same.
struct Cell {
  unsigned written_at = 0, written_at_of_warp = 0, writer = 0;
  unsigned read_at = 0, read_at_of_warp = 0;
  unsigned reading_warps = 0;  // bits, since that barrier of the block
  unsigned last_reading_warp = 0;
  unsigned reading_lanes = 0;  // of that warp, since its barrier
  unsigned copied_in = 0;      // the block, while a copy is under way
};

Cell cells[sizeof finchtune::dynamic_shared / CELL_BYTES];

bool written_beside(const Cell& cell, unsigned thread) {
  if (cell.written_at != block_barriers || cell.writer == thread) return false;
  return cell.writer / 32 != thread / 32 || cell.written_at_of_warp == current->warp_barriers;
}

bool read_beside(const Cell& cell, unsigned thread) {
  if (cell.read_at != block_barriers) return false;
  const unsigned warp = thread / 32;
  if (cell.reading_warps & ~(1u << warp)) return true;
  return cell.read_at_of_warp == current->warp_barriers &&
         cell.reading_lanes & ~(1u << thread % 32);
}

void note_read(Cell& cell, unsigned thread) {
  const unsigned warp = thread / 32;
  if (cell.read_at != block_barriers) cell.reading_warps = 0;
  if (cell.reading_warps == 0 || cell.last_reading_warp != warp ||
      cell.read_at_of_warp != current->warp_barriers) {
    cell.reading_lanes = 0;
  }
  cell.read_at = block_barriers;
  cell.read_at_of_warp = current->warp_barriers;
  cell.reading_warps |= 1u << warp;
  cell.last_reading_warp = warp;
  cell.reading_lanes |= 1u << thread % 32;
}

void note_write(Cell& cell, unsigned thread) {
  cell.written_at = block_barriers;
  cell.written_at_of_warp = current->warp_barriers;
  cell.writer = thread;
}

void report(const char* what, size_t place) {
  if (!last_error.empty()) return;
  char text[256];
  std::snprintf(text, sizeof text, "%s: byte %zu of shared memory, thread %u, after %s", what,
                place, current->index,
                current->barrier == nullptr ? "the start" : current->barrier);
  last_error = text;
}

// The running thread touches these bytes; those that are not shared memory do not count.
void touch(const void* address, size_t bytes, Access access) {
  const size_t place = static_cast<const unsigned char*>(address) - finchtune::dynamic_shared;
  if (current == nullptr || place >= sizeof finchtune::dynamic_shared) return;
  for (size_t i = place / CELL_BYTES; i <= (place + bytes - 1) / CELL_BYTES; i++) {
    Cell& cell = cells[i];
    if (access == Access::copy_ends) cell.copied_in = 0;
    if (cell.copied_in == blocks) report("touched while it is copied to", i * CELL_BYTES);
    if (written_beside(cell, current->index)) report("a race with a write", i * CELL_BYTES);
    if (access == Access::read) {
      note_read(cell, current->index);
    } else {
      if (read_beside(cell, current->index)) report("a race with a read", i * CELL_BYTES);
      note_write(cell, current->index);
      if (access == Access::copy_begins) cell.copied_in = blocks;
    }
  }
}

constexpr size_t COPIED = 16;

void perform(const Copy& copy) {
  if (copy.source != nullptr)
    std::memcpy(copy.target, copy.source, COPIED);
  else
    std::memset(copy.target, 0, COPIED);
}

}  // namespace

void Copy::begin(bool at_once) const {
  touch(target, COPIED, Access::copy_begins);
  if (at_once)
    perform(*this);
  else
    std::memset(target, 0xff, COPIED);
}

void Copy::end() const {
  touch(target, COPIED, Access::copy_ends);
  perform(*this);
}

}  // namespace emulation

using namespace emulation;

extern "C" {

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_read(void**) {}
void __tsan_vptr_update(void**, void*) {}

void __tsan_read1(void* address) { touch(address, 1, Access::read); }
void __tsan_read2(void* address) { touch(address, 2, Access::read); }
void __tsan_read4(void* address) { touch(address, 4, Access::read); }
void __tsan_read8(void* address) { touch(address, 8, Access::read); }
void __tsan_read16(void* address) { touch(address, 16, Access::read); }
void __tsan_write1(void* address) { touch(address, 1, Access::write); }
void __tsan_write2(void* address) { touch(address, 2, Access::write); }
void __tsan_write4(void* address) { touch(address, 4, Access::write); }
void __tsan_write8(void* address) { touch(address, 8, Access::write); }
void __tsan_write16(void* address) { touch(address, 16, Access::write); }
void __tsan_read_range(void* address, size_t bytes) { touch(address, bytes, Access::read); }
void __tsan_write_range(void* address, size_t bytes) { touch(address, bytes, Access::write); }

}  // extern "C"
