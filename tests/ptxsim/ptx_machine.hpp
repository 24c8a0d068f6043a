// The simulated machine: decoded programs, warps, memories, the checks on
// memory use and the counters. Instruction semantics: ptx_instructions.hpp.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <map>
#include <random>

#include "ptx_parser.hpp"

constexpr u32 ALL_LANES = 0xffffffffu;
constexpr u64 SHARED_WINDOW = 1ull << 56;   // generic addresses of shared memory
constexpr u64 LOCAL_WINDOW = 2ull << 56;    // generic addresses of local memory
constexpr u64 PARAM_IN_LOCAL = 1ull << 40;  // .param variables of calls live in local memory
constexpr u64 SHARED_START = 1024;          // first shared offset handed out
constexpr int MAX_WARPS = 64;
constexpr int RANK_SHIFT = 24;  // shared::cluster addresses: a block's rank plus one from this bit on; none is the own block
constexpr int MAX_CLUSTER = 16;

enum Check : u32 {
  CHECK_UNINITIALISED = 1,
  CHECK_SHARED_RACE = 2,
  CHECK_GLOBAL_RACE = 4,
  CHECK_CONVERGENCE = 8,
  ALLOW_EARLY_EXIT = 16,
  POISON_REGISTERS = 32,
  COLLECT_STATISTICS = 64
};

struct Machine;
struct Instr;
using Handler = void (*)(Machine&, const Instr&, u32 mask);

struct Ref {  // where 32 lane values lie: register file (bank 0) or constant bank (bank 1)
  u32 offset = 0;
  u8 bank = 0;
  u8 bytes = 0;  // per lane; 0 = predicate, one bit per lane
  bool negated = false;
  bool sink = false;
};
using CompareFn = u32 (*)(const char* a, const char* b, bool ftz);

enum class Flow : u8 {
  Next,
  Memory,
  Branch,
  BranchTable,
  Exit,
  Call,
  Return,
  Barrier,
  ClusterArrive,
  ClusterWait,
  WarpBarrier,
  WarpSync,
  WarpAligned
};

struct CallInfo {
  struct Copy {
    u32 from, to, bytes;
  };
  std::vector<Copy> arguments, results;
  u32 return_slot = 0;  // register-file offset where the callee finds its return positions
  std::string builtin;
};

struct Instr {
  Handler run = nullptr;
  const Ref* dst = nullptr;
  const Ref* src = nullptr;
  u8 dst_count = 0, src_count = 0;
  Flow flow = Flow::Next;
  Space space = Space::None;
  s32 guard = -1;  // register-file offset of the guard predicate
  bool guard_negated = false;
  bool ftz = false, sat = false, relu = false, nan_wins = false, xorsign = false;
  bool is_signed = false, strong = false, aligned = false, trans = false, flag = false, clustered = false;
  Rounding rounding = Rounding::Nearest;
  u8 element = 0, vector = 1;  // memory: bytes per element, elements
  u8 mode = 0, mode2 = 0;      // per-opcode variant
  u8 type = 0, type2 = 0;      // Type values
  u16 m = 0, n = 0, k = 0;     // mma shape
  u32 target = 0;              // branch target, function entry
  s64 immediate = 0;           // address offset, lop3 table, ...
  CompareFn compare = nullptr;
  const CallInfo* call = nullptr;
  const std::vector<u32>* table = nullptr;
  u32 line = 0;
  u16 klass = 0;  // statistics class
  const std::string* text = nullptr;
};

struct Program {
  std::string kernel;
  std::vector<Instr> code;
  std::deque<std::vector<Ref>> refs;
  std::deque<CallInfo> calls;
  std::deque<std::vector<u32>> tables;
  std::deque<std::string> texts;
  std::vector<char> constants;
  std::vector<std::pair<std::string, u32>> specials;
  std::vector<std::string> classes;
  u32 entry = 0, register_bytes = 0, local_bytes = 0, carry_offset = 0;
  u64 static_shared = 0, dynamic_shared_offset = 0;
  u32 shared_granule = 4, global_granule = 4, widest_global_load = 0;
  struct Param {
    std::string name, type;
    u32 offset, bytes, align;
  };
  std::vector<Param> params;
  u32 param_bytes = 0;
  int required_threads[3] = {0, 0, 0};
  std::vector<std::string> unsupported;
};

struct Region {
  u64 low, high;
  u64 origin;  // start of the allocation; counted as 256-byte aligned, as on a GPU
  std::string name;
  struct Use {
    u32 writer, reader;
  };  // block number + 1; see Machine::note_global
  std::shared_ptr<Use> uses;  // calloc: untouched pages cost nothing
  // What the kernel before this one, which may still run, does with it.
  enum { WRITES = 1, READS = 2 };
  u32 pending = 0;
};

struct Counters {
  u64 warp = 0, thread = 0;
  u64 requests = 0, sectors = 0, ideal_sectors = 0, bytes = 0, wavefronts = 0, ideal_wavefronts = 0;
};

struct ByteState {  // shadow of one granule of shared memory
  u32 write_clock, read_clock, other_read_clock, write_serial;
  u32 readers, other_readers;  // lanes behind MANY_LANES
  u8 write_warp, write_lane, read_warp, read_lane, other_read_warp, other_read_lane, flags, write_rank;
  // What the cluster's barriers order: how many the last writer had arrived at, and one more than the most any reader, of
  // another block or of its own, had.
  u32 write_arrivals, peer_read, own_read;
  enum { WRITTEN = 1, IN_FLIGHT = 2, STRONG = 4 };
};
constexpr u8 NO_LANE = 255, MANY_LANES = 32;

struct Group {  // lanes of a warp that share a program counter
  u32 pc, mask;
  enum State : u8 { Ready, AtBarrier, AtWarpSync, AtWarpBarrier, AtClusterBarrier } state;
  u32 barrier;
};
struct PendingCopy {
  u32 lane, group, bytes;
  u64 to;
  u8 data[16];
  u32 line;
};

struct Warp {
  int index;
  u32 live, initial;
  char* registers;
  std::vector<Group> groups;
  std::vector<PendingCopy> copies;
  u32 commits[32];
  u32 clock;
  u32 lane_sync[32];
  u32 seen[MAX_WARPS];          // vector clock
  u32 arrivals[32], waits[32];  // barriers of the cluster that a lane has arrived at, and waited for
  bool fenced;                  // has executed a fence or an acquire/release operation
  u32 waited;                   // lanes that have waited for the kernel before this one
  u32 spins;
};

struct BarrierState {
  u32 arrived, expected;
  bool counted;
  u32 seen[MAX_WARPS];
  u32 popc;
  bool any, all;
};
struct MBarrier {
  u32 expected, pending;
  s64 transactions;
  u32 phase;
  u32 seen[MAX_WARPS];
};

struct FlagState {
  u32 seen[MAX_WARPS];
};  // what a synchronising location has published

struct Launch {
  const Program* program;
  u32 grid[3], block[3], cluster[3];
  u64 shared_bytes;  // dynamic
  std::vector<u8> params;
  std::vector<Region> regions;
  u32 checks;
  u64 seed, instruction_limit;
  std::atomic<u64> next_block{0};
  std::atomic<bool> failed{false};
  std::vector<u32> block_order;
  bool threaded = false;
};

struct Cluster {  // blocks that run together, by rank
  std::vector<Machine*> members;
  u32 completed;  // barriers
};

struct Machine {
  char* base[2];  // current warp's registers, constants
  const Program* program;
  Launch* launch;
  Warp* warp = nullptr;
  std::vector<Warp> warps;
  std::vector<char> register_file, shared, local;
  u64 shared_end = 0;
  std::vector<ByteState> shadow;
  std::vector<BarrierState> barriers;
  std::unordered_map<u64, MBarrier> mbarriers;
  std::unordered_map<u64, FlagState> flags;
  std::vector<Counters> counters;
  std::vector<u8> fenced_blocks;
  u32 block_id[3];
  u32 block_number = 0, threads = 0;
  Cluster* cluster = nullptr;
  u32 rank = 0;  // in it
  bool exited = false;
  u32 peer_access = 0, most_waits = 0;  // as ByteState::peer_read, of all bytes; of all lanes
  u32 serial = 0;
  u64 executed = 0, barriers_executed = 0;
  u32 checks = 0;
  bool statistics = true, forced_switch = false;
  Region* last_region = nullptr;
  std::map<std::pair<const Region*, u32>, Counters> by_region;  // global accesses by memory region and instruction class
  std::string printed;
  std::mt19937_64 random;

  template <class T>
  T* at(const Ref& r) const {
    return (T*)(base[r.bank] + r.offset);
  }
  u32 predicate(const Ref& r) const {
    u32 p = *(u32*)(base[r.bank] + r.offset);
    return r.negated ? ~p : p;
  }
  void set_predicate(const Ref& r, u32 bits, u32 mask) {
    if (r.sink) return;
    u32* p = (u32*)(base[r.bank] + r.offset);
    *p = (*p & ~mask) | (bits & mask);
  }
  u64 read_raw(const Ref& r, int lane) const {
    const char* p = base[r.bank] + r.offset;
    switch (r.bytes) {
      case 0:
        return (predicate(r) >> lane) & 1;
      case 1:
        return ((const u8*)p)[lane];
      case 2:
        return ((const u16*)p)[lane];
      case 4:
        return ((const u32*)p)[lane];
      default:
        return ((const u64*)p)[lane];
    }
  }
  void write_raw(const Ref& r, int lane, u64 v) {
    if (r.sink) return;
    char* p = base[r.bank] + r.offset;
    switch (r.bytes) {
      case 0: {
        u32* q = (u32*)p;
        *q = (*q & ~(1u << lane)) | ((u32)(v & 1) << lane);
        break;
      }
      case 1:
        ((u8*)p)[lane] = (u8)v;
        break;
      case 2:
        ((u16*)p)[lane] = (u16)v;
        break;
      case 4:
        ((u32*)p)[lane] = (u32)v;
        break;
      default:
        ((u64*)p)[lane] = v;
    }
  }

  // ---- errors -------------------------------------------------------------
  std::string thread_name(int lane, const Warp* w = nullptr) const {
    if (!w) w = warp;
    if (lane >= 32) return "warp " + std::to_string(w->index);
    u32 t = (u32)w->index * 32 + (u32)lane;
    u32 x = t % launch->block[0], y = t / launch->block[0] % launch->block[1], z = t / launch->block[0] / launch->block[1];
    return "thread (" + std::to_string(x) + "," + std::to_string(y) + "," + std::to_string(z) + ")";
  }
  std::string block_name(u32 number) const {
    u32 x = number % launch->grid[0], y = number / launch->grid[0] % launch->grid[1],
        z = number / launch->grid[0] / launch->grid[1];
    return "block (" + std::to_string(x) + "," + std::to_string(y) + "," + std::to_string(z) + ")";
  }
  [[noreturn]] void fault(const Instr& in, int lane, const std::string& what) const {
    throw PtxError("kernel " + program->kernel + ", PTX line " + std::to_string(in.line) + " (" + (in.text ? *in.text : "") +
                   "), " + block_name(block_number) + ", " + thread_name(lane) + ": " + what);
  }
  static std::string hex(u64 v) {
    char b[32];
    std::snprintf(b, sizeof b, "0x%llx", (unsigned long long)v);
    return b;
  }

  // ---- global memory ------------------------------------------------------
  Region* find_region(u64 address) {
    auto& rs = launch->regions;
    size_t low = 0, high = rs.size();
    while (low < high) {
      size_t mid = (low + high) / 2;
      if (rs[mid].low <= address)
        low = mid + 1;
      else
        high = mid;
    }
    if (low == 0) return nullptr;
    Region* r = &rs[low - 1];
    return address < r->high ? r : nullptr;
  }
  void check_pending(const Instr& in, int lane, u64 address, bool writes) {
    const u32 pending = last_region->pending;
    if (!(pending & (writes ? Region::WRITES | Region::READS : Region::WRITES)) || warp->waited >> lane & 1) return;
    fault(in, lane,
          std::string(writes ? "writes " : "reads ") + hex(address) + ", which the kernel before this one may still " +
              (pending & Region::WRITES ? "write" : "read") + ": no griddepcontrol.wait has come yet " + nearest(address));
  }
  inline void check_global(const Instr& in, int lane, u64 address, u32 bytes, bool writes = false) {
    u64 alignment =
        bytes > 16 ? 16 : bytes;  // host arrays are 16-byte aligned; wider accesses are checked against the array's start below
    if (address & (alignment - 1))
      fault(in, lane,
            "misaligned " + std::to_string(bytes) + "-byte global access at " + hex(address) + " " + nearest(address));
    if (last_region && address >= last_region->low && address + bytes <= last_region->high && bytes <= 16)
      return check_pending(in, lane, address, writes);
    Region* r = find_region(address);
    if (!r || address + bytes > r->high)
      fault(in, lane,
            "global access of " + std::to_string(bytes) + " bytes out of bounds at " + hex(address) + " " + nearest(address));
    if (bytes > 16 && ((address - r->origin) & (bytes - 1)))
      fault(in, lane,
            "misaligned " + std::to_string(bytes) + "-byte global access at " + hex(address) + " " + nearest(address));
    last_region = r;
    check_pending(in, lane, address, writes);
  }
  std::string nearest(u64 address) {
    const Region* best = nullptr;
    u64 best_distance = ~0ull;
    for (auto& r : launch->regions) {
      u64 d = address < r.low ? r.low - address : address >= r.high ? address - r.high + 1 : 0;
      if (d < best_distance) {
        best_distance = d;
        best = &r;
      }
    }
    if (!best) return "(no array is registered)";
    s64 offset = (s64)(address - best->low);
    return "(nearest array: " + best->name + ", " + std::to_string(best->high - best->low) + " bytes; byte offset " +
           std::to_string(offset) + ")";
  }
  bool fence_excuses(u32 other) const {
    return fenced_blocks[block_number] && other && other != 0x7fffffffu && other - 1 < fenced_blocks.size() &&
           fenced_blocks[other - 1];
  }
  // Block-level races: one shadow entry per granule keeps the last writing and the reading block.
  enum Access { READ, WRITE, ATOMIC, STRONG_READ };
  void note_global(const Instr& in, int lane, u64 address, u32 bytes, Access access) {
    const u32 ATOMIC_BIT = 0x80000000u, SEVERAL = 0x7fffffffu;
    Region* r = last_region;
    u32 g = program->global_granule;
    if (!r->uses) {
      auto* fresh = (Region::Use*)std::calloc((r->high - r->low + g - 1) / g + 1, sizeof(Region::Use));
      if (!fresh) throw PtxError("not enough memory for the global race check");
      r->uses = std::shared_ptr<Region::Use>(fresh, std::free);
    }
    Region::Use* uses = r->uses.get();
    u32 me = block_number + 1;
    u64 first = (address - r->low) / g, last = (address + bytes - 1 - r->low) / g;
    for (u64 i = first; i <= last; ++i) {
      Region::Use& use = uses[i];
      u32 writer = use.writer & ~ATOMIC_BIT;
      bool atomic_writer = (use.writer & ATOMIC_BIT) != 0;
      if (writer && writer != me && !(access >= ATOMIC && atomic_writer) && !fence_excuses(writer) &&
          !(writer == SEVERAL && fenced_blocks[block_number]))
        race(in, lane, address, access, writer, atomic_writer ? "updated atomically" : "written");
      if (access == STRONG_READ) continue;
      if (access != READ && use.reader && use.reader != me && !fence_excuses(use.reader) && !fenced_blocks[block_number])
        race(in, lane, address, access, use.reader, "read");
      if (access == READ)
        use.reader = use.reader == 0 || use.reader == me ? me : SEVERAL;
      else if (access == WRITE)
        use.writer = me;
      else
        use.writer = ATOMIC_BIT | (writer == 0 || writer == me ? me : SEVERAL);
    }
  }
  [[noreturn]] void race(const Instr& in, int lane, u64 address, Access access, u32 other, const char* other_did) {
    const char* did = access == READ || access == STRONG_READ ? "reads" : access == WRITE ? "writes" : "atomically updates";
    fault(in, lane,
          std::string("global data race between blocks: this thread ") + did + " " + hex(address) + " which " +
              (other == 0x7fffffffu ? std::string("several blocks") : block_name(other - 1)) + " " + other_did +
              " in the same launch " + nearest(address));
  }

  // ---- shared memory ------------------------------------------------------
  inline void check_shared(const Instr& in, int lane, u64 address, u32 bytes) {
    if (address & (bytes - 1))
      fault(in, lane,
            "misaligned " + std::to_string(bytes) + "-byte shared access at offset " +
                std::to_string((s64)(address - SHARED_START)));
    if (address < SHARED_START || address + bytes > shared_end)
      fault(in, lane,
            "shared access of " + std::to_string(bytes) + " bytes out of bounds at offset " +
                std::to_string((s64)(address - SHARED_START)) + " (the block has " + std::to_string(shared_end - SHARED_START) +
                " bytes)");
  }
  bool ordered(u8 by_warp, u8 by_lane, u32 by_clock, int lane, u32 many = 0xffffffffu) const {
    const Warp& w = *warp;
    if (by_warp != w.index) return w.seen[by_warp] > by_clock;
    if (by_lane == lane && lane < 32) return true;
    auto synced = [&](int l) {
      if (l < 32) return w.lane_sync[l] > by_clock;
      for (int i = 0; i < 32; ++i)
        if ((w.live & many) >> i & 1 && w.lane_sync[i] <= by_clock) return false;
      return true;
    };
    return synced(lane) && synced(by_lane);
  }
  // Whether the cluster's barriers order what a thread did that had arrived at so many before this lane's next access.
  bool ordered_by_cluster(u32 arrivals, int lane) const { return lane < 32 && warp->waits[lane] > arrivals; }
  bool write_ordered(const ByteState& b, int lane) const {
    return (b.write_rank == rank && ordered(b.write_warp, b.write_lane, b.write_clock, lane)) ||
           ordered_by_cluster(b.write_arrivals, lane);
  }
  std::string peer_name(u32 of_rank) const { return block_name(cluster->members[of_rank]->block_number) + " of its cluster"; }
  std::string who(const ByteState& b) const {
    return b.write_rank == rank ? who(b.write_warp, b.write_lane) : peer_name(b.write_rank);
  }
  // The block of the cluster that a shared::cluster address is in; makes it an address there.
  Machine& owner_of(const Instr& in, int lane, u64& address) {
    if (!(address >> RANK_SHIFT)) return *this;
    const u64 of_rank = (address >> RANK_SHIFT) - 1;
    address &= (1u << RANK_SHIFT) - 1;
    if (of_rank == rank) return *this;
    if (!cluster || of_rank >= cluster->members.size())
      fault(in, lane,
            "address in the shared memory of block " + std::to_string(of_rank) + " of a cluster of " +
                std::to_string(cluster ? cluster->members.size() : 1));
    return *cluster->members[of_rank];
  }
  // An access of this lane to the shared memory of another block.
  void note_peer_access(const Instr& in, int lane, u64 address, u32 bytes, Machine& owner, bool writes) {
    const std::string whose = "the shared memory of " + block_name(owner.block_number) + " of its cluster at offset " +
                              std::to_string(address - SHARED_START);
    const char* const did = writes ? "writes " : "reads ";
    if (owner.exited) fault(in, lane, did + whose + ", which has exited");
    if (!(checks & (CHECK_UNINITIALISED | CHECK_SHARED_RACE))) return;
    const u32 stamp = warp->arrivals[lane] + 1;
    owner.peer_access = std::max(owner.peer_access, stamp);
    const u32 g = program->shared_granule;
    for (u64 i = address / g; i <= (address + bytes - 1) / g; ++i) {
      ByteState& b = owner.shadow[i];
      if (!writes && !(b.flags & ByteState::WRITTEN)) {
        if (checks & CHECK_UNINITIALISED) fault(in, lane, did + whose + ", which was never written");
      } else if (checks & CHECK_SHARED_RACE) {
        const bool mine = b.write_rank == rank && b.write_warp == warp->index && b.write_lane == lane;
        if (b.flags && !mine && !ordered_by_cluster(b.write_arrivals, lane))
          fault(in, lane,
                std::string("shared memory data race: ") + did + whose + " that " +
                    block_name(cluster->members[b.write_rank]->block_number) +
                    " wrote without a barrier of the cluster in between");
        const u32 read = std::max(b.peer_read, b.own_read);
        if (writes && read && !ordered_by_cluster(read - 1, lane))
          fault(in, lane,
                std::string("shared memory data race: ") + did + whose +
                    " that another thread read without a barrier of the cluster in between");
      }
      if (writes) {
        b.flags = ByteState::WRITTEN;
        b.write_rank = (u8)rank;
        b.write_warp = (u8)warp->index;
        b.write_lane = (u8)lane;
        b.write_arrivals = warp->arrivals[lane];
        b.write_serial = 0;
        b.read_lane = b.other_read_lane = NO_LANE;
        b.peer_read = b.own_read = 0;
      } else {
        b.peer_read = std::max(b.peer_read, stamp);
      }
    }
  }
  std::string who(u8 w, u8 lane) const { return lane < 32 ? thread_name(lane, &warps[w]) : "warp " + std::to_string(w); }
  void shared_race(const Instr& in, int lane, u64 address, const char* did, const std::string& other,
                   const char* other_did) const {
    fault(in, lane,
          std::string("shared memory data race: ") + did + " offset " + std::to_string(address - SHARED_START) + " that " +
              other + " " + other_did + " without a barrier in between");
  }
  void shared_race(const Instr& in, int lane, u64 address, const char* did, u8 w, u8 l, const char* other_did) const {
    shared_race(in, lane, address, did, who(w, l), other_did);
  }
  u32 arrivals_of(int lane) const {  // of a whole warp, the most
    return lane < 32 ? warp->arrivals[lane] : *std::max_element(warp->arrivals, warp->arrivals + 32);
  }
  void note_shared_read(const Instr& in, int lane, u64 address, u32 bytes, bool strong) {
    u32 g = program->shared_granule;
    u64 first = address / g, last = (address + bytes - 1) / g;
    for (u64 i = first; i <= last; ++i) {
      ByteState& b = shadow[i];
      if (b.flags & ByteState::IN_FLIGHT) {
        if (checks & CHECK_SHARED_RACE)
          shared_race(in, lane, i * g, "reads", b.write_warp, b.write_lane,
                      "is still filling with cp.async (missing wait): a read");
      }
      if (!(b.flags & ByteState::WRITTEN)) {
        if (checks & CHECK_UNINITIALISED)
          fault(in, lane, "reads shared memory at offset " + std::to_string(i * g - SHARED_START) + " that was never written");
      } else if ((checks & CHECK_SHARED_RACE) && !(strong && (b.flags & ByteState::STRONG)) && !write_ordered(b, lane))
        shared_race(in, lane, i * g, "reads", who(b), "wrote");
      if (cluster) b.own_read = std::max(b.own_read, arrivals_of(lane) + 1);
      u8 w = (u8)warp->index;
      if (b.read_lane != NO_LANE && b.read_warp != w) {
        b.other_read_warp = b.read_warp;
        b.other_read_lane = b.read_lane;
        b.other_read_clock = b.read_clock;
        b.other_readers = b.readers;
      }
      bool alone = (b.read_lane == lane && b.read_warp == w) || b.read_lane == NO_LANE || b.read_warp != w ||
                   b.read_clock != warp->clock;
      b.readers = (alone ? 0 : b.readers) | (lane < 32 ? 1u << lane : 0xffffffffu);
      b.read_lane = alone ? (u8)lane : MANY_LANES;
      b.read_warp = w;
      b.read_clock = warp->clock;
    }
  }
  // `fresh` points at the bytes about to be written (null for an atomic update).
  void note_shared_write(const Instr& in, int lane, u64 address, u32 bytes, const void* fresh, bool strong,
                         bool in_flight = false) {
    u32 g = program->shared_granule;
    u64 first = address / g, last = (address + bytes - 1) / g;
    for (u64 i = first; i <= last; ++i) {
      ByteState& b = shadow[i];
      if (checks & CHECK_SHARED_RACE) {
        u64 from = std::max(i * g, address), to = std::min((i + 1) * (u64)g, address + bytes);
        bool same_value = fresh && std::memcmp(shared.data() + from, (const char*)fresh + (from - address), to - from) == 0;
        if (b.flags & ByteState::IN_FLIGHT)
          shared_race(in, lane, i * g, "writes", b.write_warp, b.write_lane, "is still filling with cp.async: a write");
        if ((b.flags & ByteState::WRITTEN) && !(strong && (b.flags & ByteState::STRONG)) && !same_value) {
          if (b.write_serial == serial && fresh) {
            if (b.write_lane != lane)
              fault(in, lane,
                    "two lanes of one instruction write different values to shared offset " +
                        std::to_string(i * g - SHARED_START));
          } else if (!write_ordered(b, lane))
            shared_race(in, lane, i * g, "writes", who(b), "wrote");
        }
        if (b.peer_read && (!same_value || in_flight) && !ordered_by_cluster(b.peer_read - 1, lane))
          shared_race(in, lane, i * g, "writes", "another block of its cluster", "read");
        if ((!same_value || in_flight) && !(b.own_read && ordered_by_cluster(b.own_read - 1, lane))) {
          if (b.read_lane != NO_LANE && !(strong && (b.flags & ByteState::STRONG)) &&
              !ordered(b.read_warp, b.read_lane, b.read_clock, lane, b.readers))
            shared_race(in, lane, i * g, "writes", b.read_warp, b.read_lane, "read");
          if (b.other_read_lane != NO_LANE && !(strong && (b.flags & ByteState::STRONG)) &&
              !ordered(b.other_read_warp, b.other_read_lane, b.other_read_clock, lane, b.other_readers))
            shared_race(in, lane, i * g, "writes", b.other_read_warp, b.other_read_lane, "read");
        }
      }
      b.write_warp = (u8)warp->index;
      b.write_lane = (u8)lane;
      b.write_clock = warp->clock;
      b.write_serial = serial;
      b.write_rank = (u8)rank;
      b.write_arrivals = arrivals_of(lane);
      if (!in_flight)
        b.flags = (u8)(ByteState::WRITTEN | (strong ? ByteState::STRONG : 0));
      else
        b.flags |= ByteState::IN_FLIGHT;
    }
  }
  void land_copy(PendingCopy& c) {
    std::memcpy(shared.data() + c.to, c.data, c.bytes);
    if (!checks) return;
    u32 g = program->shared_granule;
    for (u64 i = c.to / g; i <= (c.to + c.bytes - 1) / g; ++i) {
      ByteState& b = shadow[i];
      b.flags = ByteState::WRITTEN;
      b.write_warp = (u8)warp->index;
      b.write_lane = (u8)c.lane;
      b.write_clock = warp->clock;
      b.write_serial = serial;
      b.write_rank = (u8)rank;
      b.write_arrivals = arrivals_of((int)c.lane);
      b.read_lane = b.other_read_lane = NO_LANE;
    }
  }
  void synchronise_lanes(Warp& w, u32 mask) {
    if (!checks) return;
    w.clock++;
    w.seen[w.index] = w.clock;
    for (int i = 0; i < 32; ++i)
      if (mask >> i & 1) w.lane_sync[i] = w.clock;
  }
  // Fence + strong access (atomic, volatile, acquire, release) orders warps through the location, generously.
  void synchronise_through(u64 address, bool releases, bool acquires, u32 lanes) {
    Warp& w = *warp;
    auto it = flags.find(address);
    if (acquires && it != flags.end()) {
      for (int i = 0; i < MAX_WARPS; ++i) w.seen[i] = std::max(w.seen[i], it->second.seen[i]);
      synchronise_lanes(w, lanes);
    }
    if (releases && w.fenced) {
      if (it == flags.end()) it = flags.emplace(address, FlagState{}).first;
      w.clock++;
      w.seen[w.index] = w.clock;
      for (int i = 0; i < MAX_WARPS; ++i) it->second.seen[i] = std::max(it->second.seen[i], w.seen[i]);
    }
  }
  char* local_memory(int lane) { return local.data() + ((u64)warp->index * 32 + (u64)lane) * program->local_bytes; }

  // ---- counters -----------------------------------------------------------
  Counters& counter(const Instr& in) { return counters[(size_t)(&in - program->code.data())]; }
  void count_global(const Instr& in, const u64* address, u32 mask, u32 bytes) {
    Counters& c = counter(in);
    if (!mask) return;
    const u64 origin = last_region ? last_region->origin : 0;
    u64 sorted[32];
    int n = 0;
    bool monotone = true;
    for (u32 left = mask; left; left &= left - 1) {
      u64 a = address[__builtin_ctz(left)] - origin;
      if (n && a < sorted[n - 1]) monotone = false;
      sorted[n++] = a;
    }
    if (!monotone) std::sort(sorted, sorted + n);
    u64 sectors = 0, distinct = 0, last_sector = ~0ull, last = ~0ull;
    for (int i = 0; i < n; ++i) {
      if (sorted[i] != last) {
        distinct++;
        last = sorted[i];
      }
      for (u64 s = sorted[i] >> 5; s <= (sorted[i] + bytes - 1) >> 5; ++s)
        if (s != last_sector) {
          sectors++;
          last_sector = s;
        }
    }
    const u64 ideal = (distinct * bytes + 31) / 32, requested = (u64)n * bytes;
    const auto add = [&](Counters& to) {
      to.requests++;
      to.sectors += sectors;
      to.ideal_sectors += ideal;
      to.bytes += requested;
    };
    add(c);
    if (last_region) add(by_region[{last_region, in.klass}]);
  }
  // Wavefronts of one phase (at most 128 bytes requested): the most distinct words that share a bank.
  static u32 phase_wavefronts(const u64* words, int n) {
    u32 seen = 0;
    u64 last[32];
    bool conflict = false;
    for (int i = 0; i < n; ++i) {
      u32 bank = (u32)words[i] & 31;
      if (!(seen >> bank & 1)) {
        seen |= 1u << bank;
        last[bank] = words[i];
      } else if (last[bank] != words[i]) {
        conflict = true;
        break;
      }
    }
    if (!conflict) return n ? 1 : 0;
    u64 sorted[64];
    std::copy(words, words + n, sorted);
    std::sort(sorted, sorted + n);
    n = (int)(std::unique(sorted, sorted + n) - sorted);
    u32 per_bank[32] = {0}, most = 0;
    for (int i = 0; i < n; ++i) most = std::max(most, ++per_bank[sorted[i] & 31]);
    return most;
  }
  void count_shared(const Instr& in, const u64* address, u32 mask, u32 bytes) {
    Counters& c = counter(in);
    c.requests++;
    c.bytes += (u64)__builtin_popcount(mask) * bytes;
    int lanes_per_phase = bytes <= 4 ? 32 : bytes == 8 ? 16 : 8;
    for (int start = 0; start < 32; start += lanes_per_phase) {
      u64 words[64];
      int n = 0;
      for (int l = start; l < start + lanes_per_phase; ++l)
        if (mask >> l & 1)
          for (u64 w = address[l] >> 2; w <= (address[l] + bytes - 1) >> 2; ++w) words[n++] = w;
      if (!n) continue;
      c.wavefronts += phase_wavefronts(words, n);
      c.ideal_wavefronts += 1;
    }
  }
};
