// Runs blocks: whose turn it is among warps and the lanes of a warp, control flow, barriers of blocks, warps and clusters.
#pragma once
#include <sstream>

#include "ptx_builtins.hpp"

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
              call_builtin(m, in, lanes);
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
};

// Runs block after block, or cluster after cluster with a runner for each of its blocks.
inline void run_blocks(Launch& launch, const std::vector<BlockRunner*>& runners, Cluster& cluster) {
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
