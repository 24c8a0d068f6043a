// Scheduler of warps and blocks, and the C interface that ptxsim.py uses.
#include <cstdarg>
#include <map>
#include <sstream>
#include <thread>

#include "ptx_decoder.hpp"

namespace {

class BlockRunner {
 public:
  BlockRunner(Launch& launch) : launch_(launch), program_(*launch.program) {
    m.launch = &launch;
    m.program = &program_;
    m.base[1] = const_cast<char*>(program_.constants.data());
    m.checks = launch.checks & (CHECK_UNINITIALISED | CHECK_SHARED_RACE | CHECK_GLOBAL_RACE | CHECK_CONVERGENCE);
    m.statistics = launch.checks & COLLECT_STATISTICS;
    m.threads = launch.block[0] * launch.block[1] * launch.block[2];
    size_t warps = (m.threads + 31) / 32;
    if (warps > (size_t)MAX_WARPS) throw PtxError("more than 2048 threads in a block");
    m.register_file.assign(warps * program_.register_bytes + 64, 0);
    m.local.assign((u64)warps * 32 * program_.local_bytes + 16, 0);
    m.shared_end = program_.dynamic_shared_offset + launch.shared_bytes;
    m.shared.assign(m.shared_end + 64, (char)0xff);
    m.counters.assign(program_.code.size(), Counters());
    m.fenced_blocks.assign((size_t)launch.grid[0] * launch.grid[1] * launch.grid[2], 0);
    m.warps.resize(warps);
    m.barriers.resize(16);
    m.random.seed(launch.seed * 0x9e3779b97f4a7c15ull + 1);
  }

  void start(u32 number) {
    start_block(number);
    turn_.resize(m.warps.size());
    for (size_t i = 0; i < turn_.size(); ++i) turn_[i] = (int)i;
    if (launch_.seed) std::shuffle(turn_.begin(), turn_.end(), m.random);
  }
  // A turn of every warp; false once all have left.
  enum class Step { Done, Stuck, Moved };
  Step step() {
    bool alive = false, progress = false;
    for (int i : turn_) {
      Warp& w = m.warps[(size_t)i];
      if (!w.live) continue;
      alive = true;
      u64 before = m.executed;
      run_slice(w, launch_.seed ? 1 + (int)(m.random() & 15) : 16);
      if (m.executed != before) progress = true;
    }
    return !alive ? Step::Done : progress ? Step::Moved : Step::Stuck;
  }
  [[noreturn]] void report_deadlock() {
    std::ostringstream out;
    out << "kernel " << program_.kernel << ", " << m.block_name(m.block_number) << ": deadlock.";
    for (auto& w : m.warps)
      for (auto& g : w.groups) {
        const Instr& in = program_.code[g.pc];
        out << " Warp " << w.index << " lanes " << Machine::hex(g.mask) << " wait at PTX line " << in.line << " (" << *in.text
            << ")";
        if (g.state == Group::AtBarrier)
          out << " barrier " << g.barrier << " with " << m.barriers[g.barrier].arrived << " threads arrived";
        out << ".";
      }
    throw PtxError(out.str());
  }

  Machine m;

 private:
  Launch& launch_;
  const Program& program_;
  std::vector<int> turn_;

  void start_block(u32 number) {
    m.block_number = number;
    m.block_id[0] = number % launch_.grid[0];
    m.block_id[1] = number / launch_.grid[0] % launch_.grid[1];
    m.block_id[2] = number / launch_.grid[0] / launch_.grid[1];
    std::memset(m.shared.data(), 0xff, m.shared.size());
    if (m.checks & (CHECK_UNINITIALISED | CHECK_SHARED_RACE)) {
      ByteState fresh{};
      fresh.write_lane = fresh.read_lane = fresh.other_read_lane = NO_LANE;
      m.shadow.assign(m.shared.size() / program_.shared_granule + 2, fresh);
    }
    if (launch_.checks & POISON_REGISTERS) std::memset(m.register_file.data(), 0xff, m.register_file.size());
    for (auto& b : m.barriers) b = BarrierState{};
    m.mbarriers.clear();
    m.flags.clear();
    m.serial = 0;
    m.exited = false;
    m.peer_access = m.most_waits = 0;
    uintptr_t aligned = ((uintptr_t)m.register_file.data() + 63) & ~(uintptr_t)63;
    for (size_t i = 0; i < m.warps.size(); ++i) {
      Warp& w = m.warps[i];
      w = Warp{};
      w.index = (int)i;
      u32 left = m.threads - (u32)i * 32;
      w.live = w.initial = left >= 32 ? ALL_LANES : (1u << left) - 1;
      w.registers = (char*)aligned + i * program_.register_bytes;
      w.groups.push_back({program_.entry, w.live, Group::Ready, 0});
      w.clock = 1;
      w.seen[i] = 1;
      set_specials(w);
    }
  }
  void set_specials(Warp& w) {
    const u32* block = launch_.block;
    for (auto& s : program_.specials)
      for (u32 lane = 0; lane < 32; ++lane) {
        u32 t = (u32)w.index * 32 + lane, v = 0;
        const std::string& n = s.first;
        int axis = n.size() > 2 && n[n.size() - 2] == '.' ? n.back() - 'x' : 0;
        if (axis < 0 || axis > 2) axis = 0;
        u32 tid[3] = {t % block[0], t / block[0] % block[1], t / block[0] / block[1]};
        if (n.compare(0, 4, "%tid") == 0)
          v = tid[axis];
        else if (n.compare(0, 5, "%ntid") == 0)
          v = block[axis];
        else if (n.compare(0, 6, "%ctaid") == 0)
          v = m.block_id[axis];
        else if (n.compare(0, 7, "%nctaid") == 0)
          v = launch_.grid[axis];
        else if (n == "%laneid")
          v = lane;
        else if (n == "%warpid")
          v = (u32)w.index;
        else if (n == "%nwarpid")
          v = (u32)m.warps.size();
        else if (n == "%lanemask_eq")
          v = 1u << lane;
        else if (n == "%lanemask_lt")
          v = (1u << lane) - 1;
        else if (n == "%lanemask_le")
          v = (2u << lane) - 1;
        else if (n == "%lanemask_gt")
          v = ~((2u << lane) - 1);
        else if (n == "%lanemask_ge")
          v = ~((1u << lane) - 1);
        else if (n == "%cluster_ctarank")
          v = m.rank;
        else if (n == "%cluster_nctarank")
          v = launch_.cluster[0] * launch_.cluster[1] * launch_.cluster[2];
        else if (n.compare(0, 14, "%cluster_ctaid") == 0)
          v = m.block_id[axis] % launch_.cluster[axis];
        else if (n.compare(0, 15, "%cluster_nctaid") == 0)
          v = launch_.cluster[axis];
        else if (n.compare(0, 10, "%clusterid") == 0)
          v = m.block_id[axis] / launch_.cluster[axis];
        else if (n.compare(0, 11, "%nclusterid") == 0)
          v = launch_.grid[axis] / launch_.cluster[axis];
        else if (n == "%is_explicit_cluster")
          v = m.cluster != nullptr;
        else if (n == "%nsmid")
          v = 1;
        else if (n == "%dynamic_smem_size")
          v = (u32)launch_.shared_bytes;
        else if (n == "%total_smem_size")
          v = (u32)(m.shared_end - SHARED_START);
        if (n == "%gridid")
          ((u64*)(w.registers + s.second))[lane] = 0;
        else
          ((u32*)(w.registers + s.second))[lane] = v;
      }
  }

  static bool runnable(const Group& g) { return g.state == Group::Ready; }
  // Merges groups that met and picks the runnable one with the least pc (or, for fairness, the greatest).
  int select_group(Warp& w) {
    auto& gs = w.groups;
    int best = -1;
    bool last = w.spins > 20000;
    for (size_t i = 0; i < gs.size(); ++i)
      if (runnable(gs[i]) && (best < 0 || (last ? gs[i].pc > gs[(size_t)best].pc : gs[i].pc < gs[(size_t)best].pc)))
        best = (int)i;
    if (last) w.spins = 0;
    if (best < 0) return -1;
    for (size_t i = gs.size(); i-- > 0;) {
      if ((int)i == best || gs[i].pc != gs[(size_t)best].pc ||
          (gs[i].state != Group::Ready && gs[i].state != Group::AtWarpSync))
        continue;
      gs[(size_t)best].mask |= gs[i].mask;
      gs.erase(gs.begin() + (long)i);
      if ((int)i < best) --best;
    }
    return best;
  }

  void run_slice(Warp& w, int quantum) {
    m.warp = &w;
    m.base[0] = w.registers;
    m.forced_switch = false;
    const Instr* code = program_.code.data();
    for (;;) {
      int chosen = select_group(w);
      if (chosen < 0) return;
      u32 pc = w.groups[(size_t)chosen].pc, mask = w.groups[(size_t)chosen].mask;
      u32 stop = ~0u;
      for (size_t i = 0; i < w.groups.size(); ++i)
        if ((int)i != chosen && w.groups[i].state <= Group::Ready && w.groups[i].pc > pc) stop = std::min(stop, w.groups[i].pc);
      for (size_t i = 0; i < w.groups.size(); ++i)
        if ((int)i != chosen && w.groups[i].state == Group::AtWarpSync && w.groups[i].pc > pc)
          stop = std::min(stop, w.groups[i].pc);
      bool reselect = false;
      auto save = [&] {
        w.groups[(size_t)chosen].pc = pc;
        w.groups[(size_t)chosen].mask = mask;
      };
      while (!reselect) {
        const Instr& in = code[pc];
        u32 lanes = mask;
        if (in.guard >= 0) {
          u32 p = *(u32*)(w.registers + in.guard);
          lanes &= in.guard_negated ? ~p : p;
        }
        Counters& c = m.counters[pc];
        c.warp++;
        c.thread += (u32)__builtin_popcount(lanes);
        m.executed++;
        switch (in.flow) {
          case Flow::Next:
            if (lanes) in.run(m, in, lanes);
            ++pc;
            break;
          case Flow::Memory:
            if (lanes) in.run(m, in, lanes);
            ++pc;
            if (--quantum <= 0 || m.forced_switch) {
              save();
              return;
            }
            break;
          case Flow::Branch:
            if (in.target <= pc) {
              check_limit(in);
              if (stop != ~0u) w.spins++;
              if (w.spins > 20000) reselect = true;
            }
            if (lanes == mask) {
              pc = in.target;
              if (pc < w.groups[(size_t)chosen].pc && w.groups.size() > 1) reselect = true;
              break;
            }
            if (lanes == 0) {
              ++pc;
              break;
            }
            mask &= ~lanes;
            ++pc;
            save();
            w.groups.push_back({in.target, lanes, Group::Ready, 0});
            goto next_group;
          case Flow::BranchTable: {
            check_limit(in);
            u32 left = lanes;
            const u32* index = m.at<u32>(in.src[0]);
            mask &= ~lanes;
            ++pc;
            save();
            std::vector<Group> fresh;
            while (left) {
              int lane = __builtin_ctz(left);
              if (index[lane] >= in.table->size()) m.fault(in, lane, "branch index out of range");
              u32 same = 0;
              for (int l = 0; l < 32; ++l)
                if ((left >> l & 1) && index[l] == index[lane]) same |= 1u << l;
              fresh.push_back({(*in.table)[index[lane]], same, Group::Ready, 0});
              left &= ~same;
            }
            drop_if_empty(w, chosen);
            w.groups.insert(w.groups.end(), fresh.begin(), fresh.end());
            goto next_group;
          }
          case Flow::Call: {
            check_limit(in);
            if (!lanes) {
              ++pc;
              break;
            }
            if (!in.call->builtin.empty()) {
              builtin(in, lanes);
              ++pc;
              break;
            }
            u32* slot = (u32*)(w.registers + in.call->return_slot);
            for (u32 left = lanes; left; left &= left - 1) {
              int lane = __builtin_ctz(left);
              slot[lane] = pc + 1;
              for (auto& copy : in.call->arguments)
                std::memcpy(m.local_memory(lane) + copy.to, m.local_memory(lane) + copy.from, copy.bytes);
            }
            u32 target = in.target;
            if (lanes == mask) {
              pc = target;
              save();
              goto next_group;
            }
            mask &= ~lanes;
            ++pc;
            save();
            w.groups.push_back({target, lanes, Group::Ready, 0});
            goto next_group;
          }
          case Flow::Return: {
            if (!lanes) {
              ++pc;
              break;
            }
            const u32* slot = (const u32*)(w.registers + in.immediate);
            mask &= ~lanes;
            ++pc;
            save();
            std::vector<Group> fresh;
            for (u32 left = lanes; left;) {
              u32 back = slot[__builtin_ctz(left)], same = 0;
              for (int l = 0; l < 32; ++l)
                if ((left >> l & 1) && slot[l] == back) {
                  same |= 1u << l;
                  for (auto& copy : code[back - 1].call->results)
                    std::memcpy(m.local_memory(l) + copy.to, m.local_memory(l) + copy.from, copy.bytes);
                }
              fresh.push_back({back, same, Group::Ready, 0});
              left &= ~same;
            }
            drop_if_empty(w, chosen);
            w.groups.insert(w.groups.end(), fresh.begin(), fresh.end());
            goto next_group;
          }
          case Flow::Exit:
            if (!lanes) {
              ++pc;
              break;
            }
            leave(w, in, lanes);
            mask &= ~lanes;
            ++pc;
            save();
            drop_if_empty(w, chosen);
            for (u32 id = 0; id < 16; ++id) complete_barrier(id);
            if (m.cluster) complete_cluster_barrier();
            m.warp = &w;
            m.base[0] = w.registers;
            goto next_group;
          case Flow::WarpAligned:
          case Flow::WarpSync: {
            // Lanes of one group may name different member masks (sub-warp tiles): each set runs by itself.
            const u32* member_masks = in.flow == Flow::WarpAligned ? nullptr : m.at<u32>(in.src[in.src_count - 1]);
            u32 needed = 0;
            if (!member_masks)
              needed = ALL_LANES;
            else
              for (u32 left = mask; left; left &= left - 1) needed |= member_masks[__builtin_ctz(left)];
            if (needed & w.live & ~mask) {  // wait for the other lanes
              c.warp--;
              m.executed--;
              c.thread -= (u32)__builtin_popcount(lanes);
              save();
              w.groups[(size_t)chosen].state = Group::AtWarpSync;
              goto next_group;
            }
            for (u32 left = lanes; left;) {
              u32 members = member_masks ? member_masks[__builtin_ctz(left)] : ALL_LANES, same = left;
              if (member_masks)
                for (int l = 0; l < 32; ++l)
                  if ((left >> l & 1) && member_masks[l] != members) same &= ~(1u << l);
              left &= ~same;
              u32 absent = members & w.live & ~same;
              if (m.checks & CHECK_CONVERGENCE) {
                if (absent)
                  m.fault(in, __builtin_ctz(absent),
                          "this lane is a member of a warp-wide instruction but does not take part in it (false guard or "
                          "another member mask)");
                if (same & ~members)
                  m.fault(in, __builtin_ctz(same & ~members),
                          "this lane executes a warp-wide instruction whose member mask " + Machine::hex(members) +
                              " leaves it out");
              }
              in.run(m, in, same);
              if (in.flow == Flow::WarpSync) m.synchronise_lanes(w, same);
            }
            ++pc;
            break;
          }
          case Flow::WarpBarrier: {
            if (!lanes) {
              ++pc;
              break;
            }
            u32 needed = 0;
            for (u32 left = lanes; left; left &= left - 1) needed |= m.at<u32>(in.src[0])[__builtin_ctz(left)] & w.live;
            u32 present = lanes;
            for (auto& g : w.groups)
              if (g.state == Group::AtWarpBarrier) present |= g.mask;
            if (needed & ~present) {
              save();
              w.groups[(size_t)chosen].state = Group::AtWarpBarrier;
              goto next_group;
            }
            m.synchronise_lanes(w, present);
            ++pc;
            save();
            for (auto& g : w.groups)
              if (g.state == Group::AtWarpBarrier) {
                g.state = Group::Ready;
                g.pc++;
              }
            if (--quantum <= 0) return;
            goto next_group;
          }
          case Flow::ClusterArrive:
            for (u32 left = lanes; left; left &= left - 1) {
              int lane = __builtin_ctz(left);
              if (w.arrivals[lane]++ != w.waits[lane])
                m.fault(in, lane, "arrives twice at a barrier of the cluster without waiting for it");
            }
            if (m.cluster) complete_cluster_barrier();
            ++pc;
            break;
          case Flow::ClusterWait: {
            bool waits = false;
            for (u32 left = lanes; left; left &= left - 1) {
              int lane = __builtin_ctz(left);
              if (w.arrivals[lane] == w.waits[lane])
                m.fault(in, lane, "waits for a barrier of the cluster that it has not arrived at");
              waits = waits || (m.cluster && w.arrivals[lane] > m.cluster->completed);
            }
            if (waits) {
              c.warp--;
              m.executed--;
              c.thread -= (u32)__builtin_popcount(lanes);
              save();
              w.groups[(size_t)chosen].state = Group::AtClusterBarrier;
              goto next_group;
            }
            for (u32 left = lanes; left; left &= left - 1) {
              int lane = __builtin_ctz(left);
              m.most_waits = std::max(m.most_waits, ++w.waits[lane]);
            }
            ++pc;
            break;
          }
          case Flow::Barrier: {
            if (!lanes) {
              ++pc;
              break;
            }
            u32 id = m.at<u32>(in.src[0])[__builtin_ctz(lanes)] & 15;
            u32 waiting = lanes;
            m.barriers_executed++;
            arrive(w, in, id, lanes);
            if (in.mode == 1) {
              ++pc;
              complete_barrier(id);
              m.warp = &w;
              m.base[0] = w.registers;
              break;
            }
            if (waiting != mask) {
              w.groups.push_back({pc + 1, mask & ~waiting, Group::Ready, 0});
              mask = waiting;
            }
            save();
            w.groups[(size_t)chosen].state = Group::AtBarrier;
            w.groups[(size_t)chosen].barrier = id;
            complete_barrier(id);
            return;
          }
        }
        if (pc >= stop) reselect = true;
      }
      save();
    next_group:;
    }
  }
  static void drop_if_empty(Warp& w, int chosen) {
    if (w.groups[(size_t)chosen].mask == 0) w.groups.erase(w.groups.begin() + chosen);
  }
  void check_limit(const Instr& in) {
    if (m.executed > launch_.instruction_limit)
      m.fault(in, __builtin_ctz(m.warp->live ? m.warp->live : 1),
              "instruction limit of " + std::to_string(launch_.instruction_limit) +
                  " warp instructions reached (endless loop, or a wait for another block?)");
    if (launch_.failed) throw PtxError("");
  }

  void arrive(Warp& w, const Instr& in, u32 id, u32 lanes) {
    BarrierState& b = m.barriers[id];
    if (in.flag) {
      u32 count = m.at<u32>(in.src[1])[__builtin_ctz(lanes)];
      if (b.arrived && b.counted && b.expected != count)
        m.fault(in, __builtin_ctz(lanes), "barrier " + std::to_string(id) + " is used with two different thread counts");
      b.counted = true;
      b.expected = count;
    }
    if (b.arrived == 0) {
      b.popc = 0;
      b.any = false;
      b.all = true;
      if (!in.flag) b.counted = false;
    }
    b.arrived += in.flag && lanes == w.live ? 32 : (u32)__builtin_popcount(lanes);  // counted barriers count whole warps
    if (in.mode == 2) {
      u32 p = m.predicate(in.src[in.src_count - 1]) & lanes;
      b.popc += (u32)__builtin_popcount(p);
      b.any = b.any || p;
      b.all = b.all && p == lanes;
    }
    if (m.checks) {
      w.clock++;
      w.seen[w.index] = w.clock;
      for (int i = 0; i < MAX_WARPS; ++i) b.seen[i] = std::max(b.seen[i], w.seen[i]);
    }
  }
  void complete_barrier(u32 id) {
    BarrierState& b = m.barriers[id];
    if (!b.arrived) return;
    u32 expected = b.expected;
    if (!b.counted) {
      expected = 0;
      for (auto& w : m.warps) expected += (u32)__builtin_popcount(w.live);
    }
    if (b.arrived < expected) return;
    for (auto& w : m.warps) {
      s64 seen_pc = -1;
      bool any = false;
      for (auto& g : w.groups) {
        if (g.state != Group::AtBarrier || g.barrier != id) continue;
        const Instr& in = program_.code[g.pc];
        if ((m.checks & CHECK_CONVERGENCE) && in.aligned && seen_pc >= 0 && seen_pc != g.pc) {
          m.warp = &w;
          m.fault(in, __builtin_ctz(g.mask),
                  "barrier in divergent code: other lanes of the same warp wait at the barrier of PTX line " +
                      std::to_string(program_.code[(size_t)seen_pc].line));
        }
        seen_pc = g.pc;
        any = true;
        if (in.mode == 2) {
          m.warp = &w;
          m.base[0] = w.registers;
          for (int l = 0; l < 32; ++l)
            if (g.mask >> l & 1) m.write_raw(in.dst[0], l, in.mode2 == 0 ? b.popc : in.mode2 == 1 ? b.all : b.any);
        }
        if (m.checks)
          for (int l = 0; l < 32; ++l)
            if (g.mask >> l & 1) w.lane_sync[l] = w.clock;
        g.state = Group::Ready;
        g.pc++;
      }
      if (any && m.checks)
        for (int i = 0; i < MAX_WARPS; ++i) w.seen[i] = std::max(w.seen[i], b.seen[i]);
    }
    b = BarrierState{};
  }
  // Done once every thread of the cluster has arrived, or has left the kernel.
  void complete_cluster_barrier() {
    Cluster& cluster = *m.cluster;
    for (Machine* member : cluster.members)
      for (auto& w : member->warps)
        for (u32 left = w.live; left; left &= left - 1)
          if (w.arrivals[__builtin_ctz(left)] <= cluster.completed) return;
    ++cluster.completed;
    for (Machine* member : cluster.members)
      for (auto& w : member->warps)
        for (auto& g : w.groups)
          if (g.state == Group::AtClusterBarrier) g.state = Group::Ready;
  }
  void leave(Warp& w, const Instr& in, u32 lanes) {
    w.live &= ~lanes;
    m.exited = true;
    for (auto& other : m.warps) m.exited = m.exited && !other.live;
    if (m.exited && m.peer_access > m.most_waits)
      m.fault(
          in, __builtin_ctz(lanes),
          "this block exits while another one of its cluster may still access its shared memory: there is no barrier of the "
          "cluster in between");
    if ((m.checks & CHECK_CONVERGENCE) && !(launch_.checks & ALLOW_EARLY_EXIT))
      for (auto& g : w.groups)
        if (g.state == Group::AtBarrier && program_.code[g.pc].aligned)
          m.fault(program_.code[g.pc], __builtin_ctz(g.mask),
                  "barrier in divergent code: lanes " + Machine::hex(g.mask) + " of warp " + std::to_string(w.index) +
                      " wait here while lanes " + Machine::hex(lanes) + " have left the kernel without reaching it");
    for (auto& g : w.groups)
      if (g.state == Group::AtWarpSync || g.state == Group::AtWarpBarrier) g.state = Group::Ready;
  }
  // ---- printf and assert --------------------------------------------------
  const char* generic_pointer(const Instr& in, int lane, u64 a) {
    if (a >> 56 == 2) {
      check_local(m, in, lane, a - LOCAL_WINDOW, 1);
      return m.local_memory(lane) + (a - LOCAL_WINDOW);
    }
    if (a >> 56 == 1) return m.shared.data() + (a - SHARED_WINDOW);
    m.check_global(in, lane, a, 1);
    return (const char*)a;
  }
  void builtin(const Instr& in, u32 lanes) {
    for (u32 left = lanes; left; left &= left - 1) {
      int lane = __builtin_ctz(left);
      auto argument = [&](size_t i) {
        u64 v = 0;
        std::memcpy(&v, m.local_memory(lane) + in.call->arguments[i].from, std::min<u32>(8, in.call->arguments[i].bytes));
        return v;
      };
      if (in.call->builtin == "__assertfail")
        m.fault(in, lane,
                std::string("device assertion failed: ") + generic_pointer(in, lane, argument(0)) + ", " +
                    generic_pointer(in, lane, argument(1)) + ":" + std::to_string((u32)argument(2)));
      const char* format = generic_pointer(in, lane, argument(0));
      const char* values = argument(1) ? generic_pointer(in, lane, argument(1)) : nullptr;
      if (m.printed.size() < (1u << 20)) m.printed += formatted(in, lane, format, values);
      for (auto& r : in.call->results) {
        u32 zero = 0;
        std::memcpy(m.local_memory(lane) + r.to, &zero, 4);
      }
    }
  }
  std::string formatted(const Instr& in, int lane, const char* f, const char* values) {
    std::string out;
    size_t at = 0;
    while (*f) {
      if (*f != '%') {
        out += *f++;
        continue;
      }
      if (f[1] == '%') {
        out += '%';
        f += 2;
        continue;
      }
      std::string spec(1, *f++);
      bool wide = false;
      while (*f && !strchr("diouxXeEfFgGaAcsp", *f)) {
        if (*f == 'l' || *f == 'z' || *f == 'j' || *f == 't')
          wide = true;
        else if (*f != 'h')
          spec += *f;
        ++f;
      }
      if (!*f) break;
      char kind = *f++, text[512];
      bool eight = wide || strchr("eEfFgGaAsp", kind);
      at = (at + (eight ? 7 : 3)) & ~(size_t)(eight ? 7 : 3);
      u64 v = 0;
      std::memcpy(&v, values + at, eight ? 8 : 4);
      at += eight ? 8 : 4;
      if (strchr("eEfFgGaA", kind))
        std::snprintf(text, sizeof text, (spec + kind).c_str(), bit_cast<f64>(v));
      else if (kind == 's')
        std::snprintf(text, sizeof text, (spec + kind).c_str(), generic_pointer(in, lane, v));
      else if (kind == 'c')
        std::snprintf(text, sizeof text, (spec + kind).c_str(), (int)v);
      else
        std::snprintf(text, sizeof text, (spec + (kind == 'p' ? "#llx" : std::string("ll") + kind)).c_str(),
                      (kind == 'd' || kind == 'i') && !eight ? (unsigned long long)(s64)(s32)v : (unsigned long long)v);
      out += text;
    }
    return out;
  }
};

// ---- JSON ---------------------------------------------------------------------
// Runs block after block, or cluster after cluster with a runner for each of its blocks.
void run_blocks(Launch& launch, const std::vector<BlockRunner*>& runners, Cluster& cluster) {
  const u32* size = launch.cluster;
  for (u64 next; !launch.failed && (next = launch.next_block++) < launch.block_order.size();) {
    const u32 number = launch.block_order[next], across = launch.grid[0] / size[0], down = launch.grid[1] / size[1];
    const u32 first[3] = {number % across * size[0], number / across % down * size[1], number / across / down * size[2]};
    cluster.completed = 0;
    for (u32 rank = 0; rank < runners.size(); ++rank) {
      const u32 x = first[0] + rank % size[0], y = first[1] + rank / size[0] % size[1], z = first[2] + rank / size[0] / size[1];
      runners[rank]->start((z * launch.grid[1] + y) * launch.grid[0] + x);
    }
    std::mt19937_64& random = runners[0]->m.random;
    for (bool running = true; running && !launch.failed;) {
      bool moved = false;
      BlockRunner* stuck = nullptr;
      running = false;
      for (BlockRunner* runner : runners) {
        if (launch.seed && runners.size() > 1 && random() % 2) {  // another order, and some get ahead of others
          running = moved = true;
          continue;
        }
        const BlockRunner::Step step = runner->step();
        running = running || step != BlockRunner::Step::Done;
        moved = moved || step == BlockRunner::Step::Moved;
        if (step == BlockRunner::Step::Stuck) stuck = runner;
      }
      if (stuck && !moved) stuck->report_deadlock();
    }
  }
}

std::string quoted(const std::string& s) {
  std::string out = "\"";
  for (unsigned char c : s) {
    if (c == '"' || c == '\\') {
      out += '\\';
      out += (char)c;
    } else if (c < 32) {
      char b[8];
      std::snprintf(b, sizeof b, "\\u%04x", c);
      out += b;
    } else
      out += (char)c;
  }
  return out + "\"";
}

struct LoadedModule {
  Module module;
  ModuleStorage storage;
  std::unordered_map<std::string, Program> programs;
  std::vector<Region> variables;
  std::string description, result;
};

void place_variables(LoadedModule& lm) {
  auto& vars = lm.module.variables;
  for (size_t i = 0; i < vars.size(); ++i) {
    Variable& v = vars[i];
    if (v.space != Space::Global && v.space != Space::Const) continue;
    lm.storage.blocks.emplace_back((v.bytes + 512) / 8 + 2, 0);
    u64 at = ((u64)lm.storage.blocks.back().data() + 255) & ~255ull;
    lm.storage.address[(int)i] = at;
    std::memcpy((void*)at, v.initial.data(), std::min<u64>(v.initial.size(), v.bytes));
    lm.variables.push_back({at, at + std::max<u64>(v.bytes, 1), at, "variable " + v.name, {}});
  }
  for (size_t i = 0; i < vars.size(); ++i)
    for (auto& a : vars[i].addresses) {
      auto it = lm.module.variable_by_name.find(a.symbol);
      if (it == lm.module.variable_by_name.end() || !lm.storage.address.count(it->second)) continue;
      u64 value = lm.storage.address[it->second] + (u64)a.offset;
      std::memcpy((char*)lm.storage.address[(int)i] + a.at, &value, 8);
    }
}
std::string describe(const LoadedModule& lm) {
  std::ostringstream out;
  out << "{\"version\":" << quoted(lm.module.version) << ",\"target\":" << quoted(lm.module.target) << ",\"kernels\":{";
  bool first = true;
  for (auto& f : lm.module.functions) {
    if (!f->is_kernel || !f->defined) continue;
    const Program& p = lm.programs.at(f->name);
    out << (first ? "" : ",") << quoted(f->name) << ":{\"static_shared\":" << p.static_shared
        << ",\"local_bytes\":" << p.local_bytes << ",\"instructions\":" << p.code.size()
        << ",\"register_bytes_per_warp\":" << p.register_bytes << ",\"required_threads\":[" << p.required_threads[0] << ","
        << p.required_threads[1] << "," << p.required_threads[2] << "],\"params\":[";
    first = false;
    for (size_t i = 0; i < p.params.size(); ++i)
      out << (i ? "," : "") << "{\"name\":" << quoted(p.params[i].name) << ",\"type\":" << quoted(p.params[i].type)
          << ",\"offset\":" << p.params[i].offset << ",\"bytes\":" << p.params[i].bytes << "}";
    out << "],\"unsupported\":[";
    for (size_t i = 0; i < p.unsupported.size(); ++i) out << (i ? "," : "") << quoted(p.unsupported[i]);
    out << "]}";
  }
  out << "},\"variables\":{";
  first = true;
  for (auto& v : lm.storage.address) {
    const Variable& var = lm.module.variables[(size_t)v.first];
    out << (first ? "" : ",") << quoted(var.name) << ":[" << v.second << "," << var.bytes << "]";
    first = false;
  }
  out << "}}";
  return out.str();
}

struct RegionArgument {
  u64 low, bytes, origin;
  const char* name;
};
struct LaunchArguments {
  u32 grid[3], block[3], cluster[3];
  u64 shared_bytes, seed, instruction_limit;
  const u8* params;
  const RegionArgument* regions;
  u32 param_bytes, region_count, checks, host_threads;
};

void collect_regions(Launch& launch, const LaunchArguments& a, const LoadedModule& lm) {
  std::vector<Region> all = lm.variables;
  for (u32 i = 0; i < a.region_count; ++i)
    if (a.regions[i].bytes)
      all.push_back({a.regions[i].low, a.regions[i].low + a.regions[i].bytes, a.regions[i].origin, a.regions[i].name, {}});
  all.push_back({(u64)launch.params.data(),
                 (u64)launch.params.data() + launch.params.size(),
                 (u64)launch.params.data(),
                 "kernel parameters",
                 {}});
  std::sort(all.begin(), all.end(), [](const Region& x, const Region& y) { return x.low < y.low; });
  for (auto& r : all) {  // overlapping views become one region; adjacent arrays stay apart
    if (!launch.regions.empty() && r.low < launch.regions.back().high) {
      Region& last = launch.regions.back();
      if (last.name != r.name) last.name += " / " + r.name;
      last.high = std::max(last.high, r.high);
    } else
      launch.regions.push_back(r);
  }
}
std::string run_launch(LoadedModule& lm, const std::string& kernel, const LaunchArguments& a) {
  auto it = lm.programs.find(kernel);
  if (it == lm.programs.end()) throw PtxError("no kernel named " + kernel);
  const Program& p = it->second;
  Launch launch;
  launch.program = &p;
  for (int i = 0; i < 3; ++i) {
    launch.grid[i] = a.grid[i];
    launch.block[i] = a.block[i];
    if (!a.grid[i] || !a.block[i]) throw PtxError("grid and block sizes must be positive");
  }
  if (p.required_threads[0]) {
    u32 want = (u32)p.required_threads[0] * (u32)std::max(1, p.required_threads[1]) * (u32)std::max(1, p.required_threads[2]);
    if (want != a.block[0] * a.block[1] * a.block[2])
      throw PtxError("kernel " + kernel + " requires blocks of " + std::to_string(want) + " threads");
  }
  if (a.block[0] * a.block[1] * a.block[2] > 1024) throw PtxError("more than 1024 threads in a block");
  launch.shared_bytes = a.shared_bytes;
  launch.params.assign(a.params, a.params + a.param_bytes);
  if (launch.params.empty()) launch.params.resize(8);
  launch.checks = a.checks;
  launch.seed = a.seed;
  launch.instruction_limit = a.instruction_limit;
  collect_regions(launch, a, lm);
  u64 blocks = (u64)a.grid[0] * a.grid[1] * a.grid[2], together = 1;
  for (int i = 0; i < 3; ++i) {
    launch.cluster[i] = a.cluster[i];
    together *= a.cluster[i];
    if (!a.cluster[i] || a.grid[i] % a.cluster[i]) throw PtxError("the grid is not a multiple of the cluster");
  }
  if (together > MAX_CLUSTER) throw PtxError("more than " + std::to_string(MAX_CLUSTER) + " blocks in a cluster");
  for (u64 i = 0; i < blocks / together; ++i) launch.block_order.push_back((u32)i);
  if (a.seed) {
    std::mt19937_64 r(a.seed);
    std::shuffle(launch.block_order.begin(), launch.block_order.end(), r);
  }
  u32 hosts = std::max<u32>(1, std::min<u64>(a.host_threads, blocks / together));
  launch.threaded = hosts > 1;
  std::vector<std::unique_ptr<BlockRunner>> runners;
  std::vector<std::string> errors(hosts);
  std::vector<std::vector<BlockRunner*>> of_host(hosts);
  std::vector<Cluster> clusters(hosts);
  for (u32 i = 0; i < hosts; ++i)
    for (u32 rank = 0; rank < together; ++rank) {
      runners.push_back(std::make_unique<BlockRunner>(launch));
      Machine& m = runners.back()->m;
      of_host[i].push_back(runners.back().get());
      clusters[i].members.push_back(&m);
      m.rank = rank;
      if (together > 1) m.cluster = &clusters[i];
    }
  auto work = [&](u32 i) {
    try {
      run_blocks(launch, of_host[i], clusters[i]);
    } catch (std::exception& e) {
      errors[i] = e.what();
      launch.failed = true;
    }
  };
  std::vector<std::thread> threads;
  for (u32 i = 1; i < hosts; ++i) threads.emplace_back(work, i);
  work(0);
  for (auto& t : threads) t.join();
  for (auto& e : errors)
    if (!e.empty()) throw PtxError(e);

  std::vector<Counters> total(p.code.size());
  u64 barriers = 0;
  std::string printed;
  for (auto& r : runners) {
    barriers += r->m.barriers_executed;
    printed += r->m.printed;
    for (size_t i = 0; i < total.size(); ++i) {
      const Counters& c = r->m.counters[i];
      Counters& t = total[i];
      t.warp += c.warp;
      t.thread += c.thread;
      t.requests += c.requests;
      t.sectors += c.sectors;
      t.ideal_sectors += c.ideal_sectors;
      t.bytes += c.bytes;
      t.wavefronts += c.wavefronts;
      t.ideal_wavefronts += c.ideal_wavefronts;
    }
  }
  std::map<std::pair<const Region*, u32>, Counters> by_region;
  for (auto& r : runners) {
    for (const auto& [key, c] : r->m.by_region) {
      Counters& t = by_region[key];
      t.requests += c.requests;
      t.sectors += c.sectors;
      t.ideal_sectors += c.ideal_sectors;
      t.bytes += c.bytes;
    }
  }
  std::ostringstream out;
  u64 warps_per_block = (a.block[0] * a.block[1] * a.block[2] + 31) / 32;
  out << "{\"barriers_per_warp\":" << (f64)barriers / (f64)(blocks * warps_per_block)
      << ",\"widest_global_load\":" << p.widest_global_load << ",\"printed\":" << quoted(printed)
      << ",\"shared_bytes\":" << p.dynamic_shared_offset - SHARED_START + a.shared_bytes << ",\"instructions\":[";
  bool first = true;
  for (size_t i = 0; i < total.size(); ++i) {
    const Counters& c = total[i];
    if (!c.warp) continue;
    const Instr& in = p.code[i];
    out << (first ? "" : ",") << "[" << in.line << "," << quoted(*in.text) << "," << quoted(p.classes[in.klass]) << ","
        << c.warp << "," << c.thread << "," << c.requests << "," << c.sectors << "," << c.ideal_sectors << "," << c.bytes << ","
        << c.wavefronts << "," << c.ideal_wavefronts << "]";
    first = false;
  }
  out << "],\"regions\":[";
  first = true;
  for (const auto& [key, c] : by_region) {
    out << (first ? "" : ",") << "[" << quoted(key.first->name) << "," << quoted(p.classes[key.second]) << "," << c.requests
        << "," << c.sectors << "," << c.ideal_sectors << "," << c.bytes << "]";
    first = false;
  }
  out << "]}";
  return out.str();
}

thread_local std::string last_error;

}  // namespace

extern "C" {

const char* ptxsim_error() { return last_error.c_str(); }

void* ptxsim_load(const char* text) {
  try {
    auto lm = std::make_unique<LoadedModule>();
    lm->module = Parser(text).parse();
    place_variables(*lm);
    for (size_t i = 0; i < lm->module.functions.size(); ++i) {
      const Function& f = *lm->module.functions[i];
      if (f.is_kernel && f.defined) lm->programs[f.name] = Decoder(lm->module, lm->storage, (int)i).take();
    }
    lm->description = describe(*lm);
    return lm.release();
  } catch (std::exception& e) {
    last_error = e.what();
    return nullptr;
  }
}
const char* ptxsim_describe(void* handle) { return ((LoadedModule*)handle)->description.c_str(); }
const char* ptxsim_launch(void* handle, const char* kernel, const void* arguments) {
  auto* lm = (LoadedModule*)handle;
  try {
    lm->result = run_launch(*lm, kernel, *(const LaunchArguments*)arguments);
    return lm->result.c_str();
  } catch (std::exception& e) {
    last_error = e.what();
    return nullptr;
  }
}
void ptxsim_free(void* handle) { delete (LoadedModule*)handle; }
}
