// Greedy longest match over the World vocabulary: UTF-8 bytes -> token ids.
//
// The vocabulary is a double-array trie: the child of state s by byte c is t = base(s) + c, if
// label(t) == c; no two states have the same base. So small a table stays in the processor's
// caches, where one of 256 children for each state would not.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

struct State {
  int32_t base = 0;    // 0: no children
  int16_t label = -1;  // -1: not in use
  uint16_t token = 0;  // 0: none ends here
};

struct Trie {
  std::vector<State> states;
  std::vector<bool> is_base;
  int32_t lowest_free = 1;

  // Make sure that a state with this base could have children by every byte.
  void reserve(size_t base) {
    if (base + 256 <= states.size()) return;
    states.resize(2 * base + 256);
    is_base.resize(states.size());
  }
};

struct Tokens {  // sorted by their bytes; token i is bytes[ends[i - 1]] to bytes[ends[i]]
  const uint8_t* bytes;
  const int64_t* ends;
  const int32_t* ids;

  int64_t start(int64_t i) const { return i ? ends[i - 1] : 0; }
  int64_t length(int64_t i) const { return ends[i] - start(i); }
  uint8_t at(int64_t i, int64_t depth) const { return bytes[start(i) + depth]; }
};

struct Branch {
  uint8_t byte;
  int64_t first, last;  // the tokens that go this way
};

// The smallest base, from the lowest free state on, that has room for all branches.
int32_t choose_base(Trie& trie, const std::vector<Branch>& branches) {
  while (trie.states[trie.lowest_free].label != -1) trie.reserve(++trie.lowest_free);
  for (int32_t base = std::max(trie.lowest_free - branches[0].byte, 1);; base++) {
    trie.reserve(base);
    auto taken = [&](const Branch& b) { return trie.states[base + b.byte].label != -1; };
    if (!trie.is_base[base] && std::none_of(branches.begin(), branches.end(), taken)) return base;
  }
}

// Give `state`, reached by tokens first to last with `depth` bytes, its children, and these theirs.
void grow(Trie& trie, const Tokens& tokens, int32_t state, int64_t first, int64_t last,
          int64_t depth) {
  if (tokens.length(first) == depth) trie.states[state].token = tokens.ids[first++];
  std::vector<Branch> branches;
  for (int64_t i = first; i < last; i++) {
    uint8_t byte = tokens.at(i, depth);
    if (branches.empty() || branches.back().byte != byte) branches.push_back({byte, i, i});
    branches.back().last = i + 1;
  }
  if (branches.empty()) return;
  int32_t base = choose_base(trie, branches);
  trie.states[state].base = base;
  trie.is_base[base] = true;
  for (const Branch& b : branches) trie.states[base + b.byte].label = b.byte;
  for (const Branch& b : branches) grow(trie, tokens, base + b.byte, b.first, b.last, depth + 1);
}

}  // namespace

extern "C" {

// A trie of n different tokens, none empty, sorted by their bytes, ids from 1 to 65535.
void* world_build(const uint8_t* bytes, const int64_t* ends, const int32_t* ids, int64_t n) {
  auto* trie = new Trie;
  trie->reserve(1);
  trie->states[0].label = 256;  // the root, which is nobody's child
  grow(*trie, {bytes, ends, ids}, 0, 0, n, 0);
  return trie;
}

int64_t world_bytes(const void* trie) {
  return static_cast<const Trie*>(trie)->states.size() * sizeof(State);
}

// The states to out, which has room for world_bytes, and the trie freed.
void world_take(void* handle, void* out) {
  auto* trie = static_cast<Trie*>(handle);
  std::memcpy(out, trie->states.data(), world_bytes(trie));
  delete trie;
}

// Ids of n texts to out, which has room for one of each byte and text: text i is the bytes before
// stops[i], and 0 follows it where closed[i]. sizes[i] says how many it has. Returns how many in all,
// or -1 - the place of a byte that no token begins with.
int64_t world_encode(const void* taken, const uint8_t* bytes, const int64_t* stops,
                     const uint8_t* closed, int64_t n, uint16_t* out, int64_t* sizes) {
  const State* states = static_cast<const State*>(taken);
  int64_t count = 0, start = 0;
  for (int64_t text = 0; text < n; text++) {
    int64_t before = count;
    while (start < stops[text]) {
      State state = states[0];
      uint16_t found = 0;
      int64_t end = start;
      for (int64_t i = start; i < stops[text]; i++) {
        state = states[state.base + bytes[i]];
        if (state.label != bytes[i]) break;
        if (state.token) found = state.token, end = i + 1;
      }
      if (!found) return -1 - start;
      out[count++] = found;
      start = end;
    }
    if (closed[text]) out[count++] = 0;
    sizes[text] = count - before;
  }
  return count;
}
}
