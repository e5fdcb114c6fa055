// Greedy longest match over the World vocabulary: UTF-8 bytes -> token ids.
//
// The vocabulary is a double-array trie: the child of state s by byte c is t = base(s) + c, if
// parent(t) == s. So small a table stays in the processor's caches, where one of 256 children for
// each state would not.

#include <algorithm>
#include <cstdint>
#include <vector>

namespace {

struct State {
  int32_t base = 0;
  int32_t parent = -1;  // -1: not in use
  int32_t token = 0;    // 0: none ends here
};

using Trie = std::vector<State>;

// Make sure that a state at `base` could have children by every byte.
void reserve(Trie& trie, size_t base) {
  if (base + 256 > trie.size()) trie.resize(2 * base + 256);
}

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

// Give `state`, reached by tokens first to last with `depth` bytes, its children, and these theirs.
void grow(Trie& trie, const Tokens& tokens, int32_t state, int64_t first, int64_t last,
          int64_t depth, int32_t& lowest_free) {
  if (tokens.length(first) == depth) trie[state].token = tokens.ids[first++];
  std::vector<Branch> branches;
  for (int64_t i = first; i < last; i++) {
    uint8_t byte = tokens.at(i, depth);
    if (branches.empty() || branches.back().byte != byte) branches.push_back({byte, i, i});
    branches.back().last = i + 1;
  }
  if (branches.empty()) return;
  while (trie[lowest_free].parent != -1) reserve(trie, ++lowest_free);
  int32_t base = std::max(lowest_free - branches[0].byte, 1);
  for (;; base++) {
    reserve(trie, base);
    auto taken = [&](const Branch& branch) { return trie[base + branch.byte].parent != -1; };
    if (std::none_of(branches.begin(), branches.end(), taken)) break;
  }
  trie[state].base = base;
  for (const Branch& branch : branches) trie[base + branch.byte].parent = state;
  for (const Branch& branch : branches)
    grow(trie, tokens, base + branch.byte, branch.first, branch.last, depth + 1, lowest_free);
}

}  // namespace

extern "C" {

// n different tokens, none empty, sorted by their bytes. Never freed: there is one a process.
void* world_trie(const uint8_t* bytes, const int64_t* ends, const int32_t* ids, int64_t n) {
  auto* trie = new Trie;
  reserve(*trie, 1);
  (*trie)[0].parent = 0;  // the root; no child has base 0, so none is mistaken for it
  int32_t lowest_free = 1;
  grow(*trie, {bytes, ends, ids}, 0, 0, n, 0, lowest_free);
  return trie;
}

// Ids of text (n bytes) to out, which has room for n. Returns how many, or -1 - the place of a
// byte that no token begins with.
int64_t world_encode(const void* handle, const uint8_t* text, int64_t n, int32_t* out) {
  const State* states = static_cast<const Trie*>(handle)->data();
  int64_t count = 0;
  for (int64_t start = 0; start < n;) {
    int32_t state = 0, found = 0;
    int64_t end = start;
    for (int64_t i = start; i < n; i++) {
      int32_t next = states[state].base + text[i];
      if (states[next].parent != state) break;
      state = next;
      if (states[state].token) found = states[state].token, end = i + 1;
    }
    if (!found) return -1 - start;
    out[count++] = found;
    start = end;
  }
  return count;
}
}
