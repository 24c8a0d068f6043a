// Modules, launches and their results as JSON: the C interface that __init__.py uses.
#include <map>
#include <sstream>
#include <thread>

#include "ptx_decoder.hpp"
#include "ptx_scheduler.hpp"

namespace {

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
  u64 pending;  // not memory of this kernel, but a mark on it: see Region
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
    if (a.regions[i].bytes && !a.regions[i].pending)
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
  for (u32 i = 0; i < a.region_count; ++i)
    for (auto& r : launch.regions)
      if (r.low < a.regions[i].low + a.regions[i].bytes && a.regions[i].low < r.high) r.pending |= (u32)a.regions[i].pending;
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
