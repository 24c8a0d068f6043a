// Turns the parsed statements of one kernel and the functions it calls into a
// Program: handlers chosen, operands bound to places, memory laid out.
#pragma once
#include <set>

#include "ptx_handlers.hpp"

struct ModuleStorage {  // host memory of .global and .const variables
  std::vector<std::vector<u64>> blocks;
  std::unordered_map<int, u64> address;  // variable -> host address
};

class Decoder {
 public:
  Decoder(const Module& module, const ModuleStorage& storage, int kernel) : module_(module), storage_(storage) {
    program_.kernel = module.functions[(size_t)kernel]->name;
    kernel_ = kernel;
  }
  Program take() {
    lay_out_params();
    visit_function(kernel_);
    register_top_ = 0;
    program_.carry_offset = allocate_register(0);
    for (int f : order_) lay_out_function(f);
    lay_out_shared();
    program_.shared_granule = program_.global_granule = 16;
    for (int f : order_) decode_function(f);
    for (auto& fix : call_fixes_) program_.code[fix.first].target = entry_[fix.second];
    program_.entry = entry_[kernel_];
    program_.register_bytes = (register_top_ + 63) & ~63u;
    program_.local_bytes = (local_top_ + 15) & ~15u;
    return std::move(program_);
  }

 private:
  const Module& module_;
  const ModuleStorage& storage_;
  Program program_;
  int kernel_, function_index_ = -1;
  const Function* function_ = nullptr;
  std::vector<int> order_;  // callees before callers
  std::set<int> visited_;
  std::unordered_map<int, u64> variable_address_;  // param/local/shared
  std::unordered_map<int, std::vector<u32>> register_offset_;
  std::unordered_map<int, u32> return_slot_, entry_;
  std::vector<std::pair<size_t, int>> call_fixes_;
  std::map<std::pair<u64, u32>, u32> constant_offset_;
  std::map<std::string, Ref> special_;
  std::map<std::string, u16> class_number_;
  u32 register_top_ = 0, local_top_ = 0;
  const Statement* st_ = nullptr;

  static u64 align_up(u64 v, u64 a) { return a ? (v + a - 1) / a * a : v; }
  u32 allocate_register(u32 bytes) {
    u32 size = bytes == 0 ? 4 : bytes * 32;
    if (size > 4) register_top_ = (u32)align_up(register_top_, 32);
    u32 at = register_top_;
    register_top_ += size;
    return at;
  }
  void lay_out_params() {
    const Function& f = *module_.functions[(size_t)kernel_];
    u32 at = 0;
    for (int v : f.params) {
      const Variable& p = module_.variables[(size_t)v];
      at = (u32)align_up(at, p.align);
      variable_address_[v] = at;
      program_.params.push_back({p.name, p.element_type, at, (u32)p.bytes, p.align});
      at += (u32)p.bytes;
    }
    program_.param_bytes = at;
    for (int i = 0; i < 3; ++i) program_.required_threads[i] = f.required_threads[i];
  }
  static const std::string* callee_name(const Statement& s) {
    if (s.opcode[0] != "call") return nullptr;
    for (auto& o : s.operands)
      if (o.kind == Operand::Name) return &o.name;
    return nullptr;
  }
  void visit_function(int f) {
    if (!visited_.insert(f).second) return;
    for (auto& s : module_.functions[(size_t)f]->statements)
      if (auto* n = callee_name(s)) {
        auto it = module_.function_by_name.find(*n);
        if (it != module_.function_by_name.end() && module_.functions[(size_t)it->second]->defined) visit_function(it->second);
      }
    order_.push_back(f);
  }
  void lay_out_function(int index) {
    const Function& f = *module_.functions[(size_t)index];
    auto& offsets = register_offset_[index];
    for (u32 bytes : f.register_bytes) offsets.push_back(allocate_register(bytes));
    return_slot_[index] = allocate_register(4);
    for (size_t v = 0; v < module_.variables.size(); ++v) {
      const Variable& var = module_.variables[v];
      if (var.function != index || variable_address_.count((int)v)) continue;
      if (var.space == Space::Local || var.space == Space::Param) {
        local_top_ = (u32)align_up(local_top_, std::max<u32>(var.align, 16));
        variable_address_[(int)v] = local_top_ | (var.space == Space::Param ? PARAM_IN_LOCAL : 0);
        local_top_ += (u32)std::max<u64>(var.bytes, 1);
      }
    }
  }
  void note_used(const Operand& o, std::set<int>& used) {
    if (o.kind == Operand::Variable) used.insert(o.index);
    for (auto& i : o.items) note_used(i, used);
  }
  void lay_out_shared() {
    std::set<int> used;
    for (int f : order_)
      for (auto& s : module_.functions[(size_t)f]->statements)
        for (auto& o : s.operands) note_used(o, used);
    u64 at = SHARED_START;
    for (int v : used) {
      const Variable& var = module_.variables[(size_t)v];
      if (var.space != Space::Shared || var.unsized) continue;
      at = align_up(at, var.align);
      variable_address_[v] = at;
      at += var.bytes;
    }
    program_.static_shared = at - SHARED_START;
    u64 align = 16;
    for (int v : used)
      if (module_.variables[(size_t)v].space == Space::Shared && module_.variables[(size_t)v].unsized)
        align = std::max<u64>(align, module_.variables[(size_t)v].align);
    program_.dynamic_shared_offset = align_up(at, align);
    for (int v : used)
      if (module_.variables[(size_t)v].space == Space::Shared && module_.variables[(size_t)v].unsized)
        variable_address_[v] = program_.dynamic_shared_offset;
  }
  u64 address_of(int v) {
    auto it = variable_address_.find(v);
    if (it != variable_address_.end()) return it->second;
    auto host = storage_.address.find(v);
    if (host == storage_.address.end()) fail("no address for " + module_.variables[(size_t)v].name);
    return host->second;
  }

  [[noreturn]] void fail(const std::string& what) { throw PtxError(what); }
  bool has(const char* part) const {
    for (auto& p : st_->opcode)
      if (p == part) return true;
    return false;
  }
  // The n-th type among the parts of the opcode, or "".
  std::string type_name(int n = 0) const {
    static const std::set<std::string> types = {
        "u8",   "u16", "u32", "u64",   "s8",     "s16",   "s32",   "s64",   "b8",   "b16",  "b32",    "b64",    "b128", "f16",
        "bf16", "f32", "f64", "f16x2", "bf16x2", "f32x2", "u16x2", "s16x2", "tf32", "pred", "e4m3x2", "e5m2x2", "e4m3", "e5m2"};
    for (size_t i = 1; i < st_->opcode.size(); ++i)
      if (types.count(st_->opcode[i]) && n-- == 0) return st_->opcode[i];
    return "";
  }
  static Type type_of(const std::string& t) {
    static const std::map<std::string, Type> known = {{"u8", Type::U8},     {"b8", Type::U8},         {"u16", Type::U16},
                                                      {"b16", Type::U16},   {"u32", Type::U32},       {"b32", Type::U32},
                                                      {"u64", Type::U64},   {"b64", Type::U64},       {"s8", Type::S8},
                                                      {"s16", Type::S16},   {"s32", Type::S32},       {"s64", Type::S64},
                                                      {"f16", Type::F16},   {"bf16", Type::BF16},     {"f32", Type::F32},
                                                      {"f64", Type::F64},   {"f16x2", Type::F16x2},   {"bf16x2", Type::BF16x2},
                                                      {"tf32", Type::TF32}, {"e4m3x2", Type::E4M3x2}, {"e5m2x2", Type::E5M2x2}};
    auto it = known.find(t);
    return it == known.end() ? Type::Other : it->second;
  }
  Ref constant(u64 bits, u32 bytes) {
    u32 width = bytes ? bytes : 4;
    auto key = std::make_pair(bits, bytes);
    auto it = constant_offset_.find(key);
    u32 at;
    if (it != constant_offset_.end())
      at = it->second;
    else {
      at = (u32)program_.constants.size();
      program_.constants.resize(at + std::max<u32>(32 * width, 32));
      for (int i = 0; i < (bytes ? 32 : 1); ++i) std::memcpy(program_.constants.data() + at + (u32)i * width, &bits, width);
      if (bytes == 0) {
        u32 all = bits & 1 ? ALL_LANES : 0;
        std::memcpy(program_.constants.data() + at, &all, 4);
      }
      constant_offset_[key] = at;
    }
    Ref r;
    r.offset = at;
    r.bank = 1;
    r.bytes = (u8)bytes;
    return r;
  }
  Ref special(const std::string& name) {
    auto it = special_.find(name);
    if (it != special_.end()) return it->second;
    Ref r;
    bool wide = name == "%gridid" || name == "%clock64" || name == "%globaltimer";
    r.bytes = wide ? 8 : 4;
    r.offset = allocate_register(r.bytes);
    program_.specials.push_back({name, r.offset});
    special_[name] = r;
    return r;
  }
  // Binds an operand. `bytes` is the width the instruction wants (0: predicate, ANY: the register's own).
  static constexpr u32 ANY = 255;
  Ref bind(const Operand& o, u32 bytes, bool float_type = false) {
    Ref r;
    switch (o.kind) {
      case Operand::Sink:
        r.sink = true;
        r.bytes = (u8)(bytes == ANY ? 4 : bytes);
        return r;
      case Operand::Register:
        r.offset = register_offset_[function_index_][(size_t)o.index];
        r.bytes = (u8)function_->register_bytes[(size_t)o.index];
        r.negated = o.negated;
        if (bytes != ANY && r.bytes != bytes)
          fail("register " + function_->register_names[(size_t)o.index] + " has " + std::to_string(r.bytes * 8) +
               " bits where the instruction needs " + std::to_string(bytes * 8));
        return r;
      case Operand::Special: {
        r = special(o.name);
        return r;
      }
      case Operand::Integer:
        if (bytes == ANY) bytes = 8;
        if (float_type && o.bits < 65536 && bytes >= 4 && o.bits != 0)
          return constant(bytes == 4 ? bit_cast<u32>((f32)o.bits) : bit_cast<u64>((f64)o.bits), bytes);
        r = constant(bytes >= 8 ? o.bits : bytes == 0 ? (o.bits != 0) : o.bits & ((1ull << (8 * bytes)) - 1), bytes);
        if (bytes == 0 && o.negated) r.negated = true;
        return r;
      case Operand::Float32:
        if (bytes == 8) return constant(float_type ? bit_cast<u64>((f64)bit_cast<f32>((u32)o.bits)) : o.bits, 8);
        return constant(o.bits, 4);
      case Operand::Float64:
        if (bytes == 4) return constant(bit_cast<u32>((f32)bit_cast<f64>(o.bits)), 4);
        if (bytes == 2)
          return constant(has("bf16") ? BFloat::from_double(bit_cast<f64>(o.bits)) : Half::from_double(bit_cast<f64>(o.bits)),
                          2);
        return constant(o.bits, 8);
      case Operand::Variable: {
        u64 a = address_of(o.index) + (u64)o.offset;
        if (bytes == ANY) bytes = 8;
        return constant(bytes == 4 ? a & 0xffffffffu : a, bytes);
      }
      default:
        fail("operand form not understood");
    }
  }
  std::vector<Ref> dst_, src_;
  void dst(const Operand& o, u32 bytes) {
    if (o.kind == Operand::Pair) {
      dst_.push_back(bind(o.items[0], bytes));
      dst_.push_back(bind(o.items[1], 0));
    } else if (o.kind == Operand::Vector)
      for (auto& i : o.items) dst_.push_back(bind(i, bytes));
    else
      dst_.push_back(bind(o, bytes));
  }
  void src(const Operand& o, u32 bytes, bool is_float = false) {
    if (o.kind == Operand::Vector)
      for (auto& i : o.items) src_.push_back(bind(i, bytes, is_float));
    else
      src_.push_back(bind(o, bytes, is_float));
  }
  const Operand& op(size_t i) {
    if (i >= st_->operands.size()) fail("too few operands");
    return st_->operands[i];
  }
  size_t op_count() const { return st_->operands.size(); }
  void address(Instr& in, const Operand& o) {
    if (o.kind != Operand::Address) fail("address expected");
    in.immediate = o.offset;
    const Operand& b = o.items[0];
    if (b.kind == Operand::Integer) {
      src_.push_back(constant(b.bits, 8));
      return;
    }
    src_.push_back(bind(b, ANY));
  }
  Space space_of(const Operand& addr) {
    for (auto& p : st_->opcode) {
      std::string s = p.substr(0, p.find("::"));
      if (s == "global") return Space::Global;
      if (s == "shared") return Space::Shared;
      if (s == "local") return Space::Local;
      if (s == "const") return Space::Const;
      if (s == "param") return Space::Param;
    }
    if (addr.kind == Operand::Address && addr.items[0].kind == Operand::Variable) return Space::Generic;
    return Space::Generic;
  }
  void set_class(Instr& in, const std::string& name) {
    auto it = class_number_.find(name);
    if (it == class_number_.end()) {
      it = class_number_.emplace(name, (u16)program_.classes.size()).first;
      program_.classes.push_back(name);
    }
    in.klass = it->second;
  }
  u32 label_position(const std::string& name, int scope, const std::vector<u32>& start) {
    for (int s = scope; s >= 0; s = function_->scope_parent[(size_t)s])
      for (auto& l : function_->labels)
        if (l.scope == s && l.name == name) return start[(size_t)l.position];
    for (auto& l : function_->labels)
      if (l.name == name) return start[(size_t)l.position];
    fail("unknown label " + name);
  }

  void decode_function(int index) {
    function_index_ = index;
    function_ = module_.functions[(size_t)index].get();
    u32 first = (u32)program_.code.size();
    entry_[index] = first;
    size_t n = function_->statements.size();
    std::vector<u32> start(n + 1);
    for (size_t i = 0; i <= n; ++i) start[i] = first + (u32)i;
    std::unordered_map<std::string, const std::string*> texts;
    for (size_t i = 0; i < n; ++i) {
      st_ = &function_->statements[i];
      Instr in;
      dst_.clear();
      src_.clear();
      std::string why;
      try {
        if (!decode(in, start)) why = st_->text;
      } catch (PtxError& e) {
        why = st_->text + " (" + e.what() + ")";
      }
      if (!why.empty()) {
        in = Instr();
        in.run = unsupported;
        set_class(in, "unsupported");
        program_.unsupported.push_back("line " + std::to_string(st_->line) + ": " + why);
        dst_.clear();
        src_.clear();
      }
      in.line = (u32)st_->line;
      if (st_->guard >= 0) {
        in.guard = (s32)register_offset_[index][(size_t)st_->guard];
        in.guard_negated = st_->guard_negated;
      }
      auto& text = texts[why.empty() ? st_->text : why];
      if (!text) {
        program_.texts.push_back(why.empty() ? st_->text : why);
        text = &program_.texts.back();
      }
      in.text = text;
      program_.refs.push_back(dst_);
      in.dst = program_.refs.back().data();
      in.dst_count = (u8)dst_.size();
      program_.refs.push_back(src_);
      in.src = program_.refs.back().data();
      in.src_count = (u8)src_.size();
      program_.code.push_back(in);
    }
    Instr end;  // falling off the end returns
    end.flow = index == kernel_ ? Flow::Exit : Flow::Return;
    set_class(end, "branch");
    end.immediate = return_slot_[index];
    end.line = n ? (u32)function_->statements[n - 1].line : 0;
    program_.texts.push_back("end of function");
    end.text = &program_.texts.back();
    program_.code.push_back(end);
  }

  // ---- per-opcode decoding ------------------------------------------------
  bool decode(Instr& in, const std::vector<u32>& start) {
    const std::string& name = st_->opcode[0];
    in.ftz = has("ftz");
    in.sat = has("sat") || has("satfinite");
    in.relu = has("relu");
    in.nan_wins = has("NaN");
    in.xorsign = has("xorsign");
    if (has("rz") || has("rzi"))
      in.rounding = Rounding::Zero;
    else if (has("rm") || has("rmi"))
      in.rounding = Rounding::Down;
    else if (has("rp") || has("rpi"))
      in.rounding = Rounding::Up;
    else if (has("rna"))
      in.rounding = Rounding::NearestAway;
    if (control_flow(in, name, start)) return true;
    if (memory(in, name)) return true;
    if (warp_level(in, name)) return true;
    if (name == "mov") return move(in);
    if (name == "cvt") return conversion(in);
    if (name == "setp" || name == "set") return comparison(in, name);
    std::string t = type_name();
    if (half_type(in, name, t)) return true;
    if (t == "f32" || t == "f64" || t == "f32x2") return floating(in, name, t);
    return integer(in, name, t);
  }
  bool simple(Instr& in, Handler h, u32 bytes, size_t sources, const std::string& klass, bool is_float = false) {
    in.run = h;
    dst(op(0), bytes);
    for (size_t i = 1; i <= sources; ++i) src(op(i), bytes, is_float);
    set_class(in, klass);
    return h != nullptr;
  }
  bool control_flow(Instr& in, const std::string& name, const std::vector<u32>& start) {
    if (name == "bra") {
      in.flow = Flow::Branch;
      in.target = label_position(op(0).name, st_->scope, start);
      set_class(in, "branch");
      return true;
    }
    if (name == "brx") {
      in.flow = Flow::BranchTable;
      src(op(0), 4);
      program_.tables.emplace_back();
      for (auto& b : function_->branch_targets)
        if (b.name == op(1).name)
          for (auto& l : b.labels) program_.tables.back().push_back(label_position(l, st_->scope, start));
      in.table = &program_.tables.back();
      set_class(in, "branch");
      return true;
    }
    if (name == "ret" || name == "exit") {
      in.flow = name == "exit" || function_->is_kernel ? Flow::Exit : Flow::Return;
      in.immediate = return_slot_[function_index_];
      set_class(in, "branch");
      return true;
    }
    if (name == "trap" || name == "brkpt") {
      in.run = trap;
      set_class(in, "branch");
      return true;
    }
    if (name == "call") return call(in);
    if ((name == "bar" || name == "barrier") && has("warp")) {
      in.flow = Flow::WarpBarrier;
      src(op(0), 4);
      set_class(in, "barrier");
      return true;
    }
    if (name == "bar" || name == "barrier") {
      if (has("cluster")) {  // a relaxed arrival would order nothing
        if (has("relaxed") || has("arrive") == has("wait")) return false;
        in.flow = has("arrive") ? Flow::ClusterArrive : Flow::ClusterWait;
        in.aligned = has("aligned");
        set_class(in, "barrier");
        return true;
      }
      in.flow = Flow::Barrier;
      in.aligned = name == "bar" || has("aligned");
      in.mode = has("arrive") ? 1 : has("red") ? 2 : 0;
      size_t i = 0;
      if (in.mode == 2) {
        bool pop = has("popc");
        in.mode2 = pop ? 0 : has("and") ? 1 : 2;
        dst(op(i++), pop ? 4 : 0);
      }
      src(op(i++), 4);
      size_t left = op_count() - i;
      if (in.mode == 2) {
        Ref p = bind(op(op_count() - 1), 0);
        if (left > 1) src(op(i), 4);
        src_.push_back(p);
        in.flag = left > 1;
      } else {
        in.flag = left > 0;
        if (left) src(op(i), 4);
      }
      set_class(in, "barrier");
      return true;
    }
    return false;
  }
  bool call(Instr& in) {
    std::vector<int> arguments, results;
    const std::string* callee = callee_name(*st_);
    if (!callee) fail("indirect call");
    bool before = true;
    for (auto& o : st_->operands) {
      if (o.kind == Operand::Name) {
        before = false;
        continue;
      }
      if (o.kind != Operand::List) continue;
      for (auto& i : o.items) {
        if (i.kind != Operand::Variable) fail("register arguments of calls");
        (before ? results : arguments).push_back(i.index);
      }
    }
    set_class(in, "branch");
    program_.calls.emplace_back();
    CallInfo& info = program_.calls.back();
    in.call = &info;
    in.flow = Flow::Call;
    auto it = module_.function_by_name.find(*callee);
    const Function* f = it == module_.function_by_name.end() ? nullptr : module_.functions[(size_t)it->second].get();
    auto local = [&](int v) { return (u32)(address_of(v) & (PARAM_IN_LOCAL - 1)); };
    if (!f || !f->defined) {
      if (*callee != "vprintf" && *callee != "__assertfail") fail("call of the external function " + *callee);
      info.builtin = *callee;
      for (int v : arguments) info.arguments.push_back({local(v), 0, (u32)module_.variables[(size_t)v].bytes});
      for (int v : results) info.results.push_back({0, local(v), 4});
      return true;
    }
    if (!visited_.count(it->second) || it->second == function_index_) fail("recursive call");
    for (size_t i = 0; i < arguments.size() && i < f->params.size(); ++i)
      info.arguments.push_back({local(arguments[i]), local(f->params[i]), (u32)module_.variables[(size_t)f->params[i]].bytes});
    for (size_t i = 0; i < results.size() && i < f->results.size(); ++i)
      info.results.push_back({local(f->results[i]), local(results[i]), (u32)module_.variables[(size_t)results[i]].bytes});
    info.return_slot = return_slot_[it->second];
    call_fixes_.push_back({program_.code.size(), it->second});
    return true;
  }
  static const char* space_word(Space s) {
    return s == Space::Global   ? "global"
           : s == Space::Shared ? "shared"
           : s == Space::Local  ? "local"
           : s == Space::Const  ? "const"
           : s == Space::Param  ? "param"
                                : "generic";
  }
  static std::string space_word(const Instr& in) {
    return space_word(in.space) + std::string(in.space == Space::Shared && in.clustered ? "::cluster" : "");
  }
  void note_granule(const Instr& in, u32 bytes) {
    if (in.space == Space::Shared || in.space == Space::Generic)
      program_.shared_granule = std::min(program_.shared_granule, bytes);
    if (in.space == Space::Global || in.space == Space::Generic)
      program_.global_granule = std::min(program_.global_granule, bytes);
  }
  bool memory(Instr& in, const std::string& name) {
    if (name == "ld" || name == "ldu" || name == "st") {
      std::string t = type_name();
      if (t == "b128") return false;
      in.flow = Flow::Memory;
      in.element = (u8)type_bytes(t);
      in.is_signed = t[0] == 's';
      in.vector = has("v2") ? 2 : has("v4") ? 4 : has("v8") ? 8 : 1;
      in.strong = has("volatile") || has("relaxed") || has("acquire") || has("release") || has("mmio");
      const Operand& a = name == "st" ? op(0) : op(1);
      in.space = space_of(a);
      in.clustered = in.space == Space::Generic || st_->text.find("shared::cluster") != std::string::npos;
      address(in, a);
      in.aligned = has("release");
      if (name == "st") {
        src(op(1), ANY);
        in.run = store;
        set_class(in, "store " + space_word(in));
      } else {
        dst(op(0), ANY);
        in.run = load;
        set_class(in, "load " + space_word(in));
      }
      for (size_t i = name == "st" ? 1 : 0; i < (name == "st" ? src_.size() : 0); ++i)
        if (src_[i].bank == 1 && src_[i].bytes == 4 && in.element == 8) fail("immediate width");
      if (name != "st" && (in.space == Space::Global || in.space == Space::Generic))
        program_.widest_global_load = std::max(program_.widest_global_load, (u32)in.element * in.vector);
      note_granule(in, in.element);
      if (in.space == Space::Param) in.flow = Flow::Next;
      return true;
    }
    if (name == "atom" || name == "red") {
      if (st_->text.find("::cluster") != std::string::npos && st_->text.find("async") != std::string::npos) return false;
      static const std::map<std::string, AtomOp> ops = {
          {"add", AtomOp::Add}, {"min", AtomOp::Min},   {"max", AtomOp::Max}, {"inc", AtomOp::Inc}, {"dec", AtomOp::Dec},
          {"cas", AtomOp::Cas}, {"exch", AtomOp::Exch}, {"and", AtomOp::And}, {"or", AtomOp::Or},   {"xor", AtomOp::Xor}};
      bool found = false;
      for (auto& p : st_->opcode) {
        auto it = ops.find(p);
        if (it != ops.end()) {
          in.mode = (u8)it->second;
          found = true;
        }
      }
      std::string t = type_name();
      if (!found || t == "b128" || type_of(t) == Type::Other) return false;
      in.type = (u8)type_of(t);
      in.element = (u8)type_bytes(t);
      in.vector = has("v2") ? 2 : has("v4") ? 4 : has("v8") ? 8 : 1;
      in.aligned = has("acquire") || has("release") || has("acq_rel");
      in.flow = Flow::Memory;
      size_t i = 0;
      if (name == "atom") dst(op(i++), in.element);
      in.space = space_of(op(i));
      address(in, op(i++));
      src(op(i++), in.element);
      if ((AtomOp)in.mode == AtomOp::Cas) src(op(i++), in.element);
      in.run = atomic;
      set_class(in, std::string("atomic ") + space_word(in.space));
      note_granule(in, in.element);
      return true;
    }
    if (name == "cvta") {
      std::string t = type_name();
      u32 bytes = type_bytes(t);
      dst(op(0), bytes);
      src(op(1), bytes);
      Space s = space_of(op(1));
      u64 window = s == Space::Shared ? SHARED_WINDOW : s == Space::Local ? LOCAL_WINDOW : 0;
      set_class(in, "move");
      if (bytes == 4) window = 0;
      in.immediate = (s64)(has("to") ? (u64) - (s64)window : window);
      in.run = bytes == 4 ? (Handler)move_value<u32> : (Handler)UNARY(u64, u64, a + (u64)in.immediate);
      if (s == Space::Param)
        in.run = [](Machine& m, const Instr& i, u32 mask) {
          u64 b = (u64)m.launch->params.data();
          map1<u64, u64>(m, i, mask, [b](u64 a) { return a + b; });
        };
      return true;
    }
    if (name == "mapa" || name == "getctarank") {
      const bool wide = type_bytes(type_name()) == 8 && name == "mapa";
      const u32 bytes = wide ? 8 : 4;
      dst(op(0), name == "mapa" ? bytes : 4);
      src(op(1), bytes);
      if (name == "mapa") src(op(2), 4);
      in.run = name == "mapa" ? (wide ? map_to_peer<u64> : map_to_peer<u32>) : rank_of_address<u32>;
      set_class(in, "move");
      return true;
    }
    if (name == "isspacep") {
      dst(op(0), 0);
      src(op(1), ANY);
      in.space = space_of(op(1));
      in.run = is_space;
      set_class(in, "move");
      return true;
    }
    if (name == "membar" || name == "fence") {
      bool device = has("gl") || has("sys") || has("gpu");
      in.run = device ? fence : fence_block;
      in.flow = Flow::Memory;
      set_class(in, "barrier");
      return true;
    }
    if (name == "prefetch" || name == "prefetchu" || name == "applypriority" || name == "discard" || name == "nanosleep" ||
        name == "setmaxnreg" || name == "pmevent") {
      in.run = name == "nanosleep" ? (Handler)[](Machine & m, const Instr&, u32) { m.forced_switch = true; } : (Handler)no_operation;
      if (name == "nanosleep") in.flow = Flow::Memory;
      set_class(in, "other");
      return true;
    }
    if (name == "griddepcontrol") {
      in.run = has("wait") ? wait_for_grid : no_operation;
      set_class(in, "barrier");
      return true;
    }
    if (name == "createpolicy") {
      dst(op(0), 8);
      src_.push_back(constant(0, 8));
      in.run = move_value<u64>;
      set_class(in, "other");
      return true;
    }
    if (name == "cp") {
      if (st_->opcode.size() < 3 || st_->opcode[1] != "async" || has("bulk") || has("mbarrier") || has("reduce")) return false;
      in.flow = Flow::Memory;
      if (st_->opcode[2] == "commit_group") {
        in.run = cp_async_commit;
        set_class(in, "cp.async");
        return true;
      }
      if (st_->opcode[2] == "wait_group" || st_->opcode[2] == "wait_all") {
        in.immediate = st_->opcode[2] == "wait_all" ? -1 : (s64)op(0).bits;
        in.run = cp_async_wait;
        set_class(in, "cp.async");
        return true;
      }
      address(in, op(0));
      src_.push_back(bind(op(1).items[0], ANY));
      in.target = (u32)op(1).offset;
      in.element = (u8)op(2).bits;
      if (op_count() > 3 && !(has("L2::cache_hint") && op_count() == 4)) {
        const Operand& o = op(3);
        src_.push_back(o.kind == Operand::Integer ? constant(o.bits, 4) : bind(o, ANY));
      }
      in.run = cp_async;
      in.space = Space::Global;
      program_.widest_global_load = std::max(program_.widest_global_load, (u32)in.element);
      note_granule(in, 4);
      program_.shared_granule = std::min<u32>(program_.shared_granule, in.element);
      set_class(in, "cp.async");
      return true;
    }
    if (name == "mbarrier") {
      const std::string& what = st_->opcode[1];
      in.flow = Flow::Memory;
      set_class(in, "barrier");
      if (what == "init") {
        address(in, op(0));
        src(op(1), 4);
        in.run = mbarrier_init;
        return true;
      }
      if (what == "inval") {
        address(in, op(0));
        in.run = mbarrier_inval;
        return true;
      }
      if (what == "arrive" || what == "expect_tx" || what == "complete_tx") {
        in.mode = what == "expect_tx" ? 2 : what == "complete_tx" ? 3 : has("expect_tx") ? 1 : 0;
        size_t i = 0;
        if (op(0).kind != Operand::Address) {
          if (op(0).kind == Operand::Sink)
            ++i;
          else
            dst(op(i++), 8);
        }
        address(in, op(i++));
        if (i < op_count()) src(op(i), 4);
        in.run = mbarrier_arrive;
        return true;
      }
      if (what == "test_wait" || what == "try_wait") {
        dst(op(0), 0);
        address(in, op(1));
        in.flag = has("parity");
        src(op(2), in.flag ? 4 : 8);
        in.run = mbarrier_test;
        return true;
      }
      return false;
    }
    return false;
  }
  bool warp_level(Instr& in, const std::string& name) {
    auto member_mask = [&](const Operand& o) {
      in.flow = Flow::WarpSync;
      src_.push_back(bind(o, 4));
    };  // always the last source
    if (name == "shfl") {
      in.mode = has("up") ? 0 : has("down") ? 1 : has("bfly") ? 2 : 3;
      dst(op(0), 4);
      src(op(1), 4);
      src(op(2), 4);
      src(op(3), 4);
      in.run = shfl;
      set_class(in, "shuffle/vote");
      if (has("sync")) member_mask(op(4));
      return has("sync");
    }
    if (name == "vote") {
      in.mode = has("all") ? 0 : has("any") ? 1 : has("uni") ? 2 : 3;
      dst(op(0), in.mode == 3 ? 4 : 0);
      src(op(1), 0);
      in.run = vote;
      set_class(in, "shuffle/vote");
      if (has("sync")) member_mask(op(2));
      return has("sync");
    }
    if (name == "match") {
      in.mode = has("any") ? 0 : 1;
      dst(op(0), 4);
      src(op(1), type_bytes(type_name()));
      in.run = match_sync;
      member_mask(op(2));
      set_class(in, "shuffle/vote");
      return true;
    }
    if (name == "redux") {
      in.mode = (u8)(has("add")   ? AtomOp::Add
                     : has("min") ? AtomOp::Min
                     : has("max") ? AtomOp::Max
                     : has("and") ? AtomOp::And
                     : has("or")  ? AtomOp::Or
                                  : AtomOp::Xor);
      in.type = (u8)type_of(type_name());
      dst(op(0), 4);
      src(op(1), 4);
      in.run = redux;
      member_mask(op(2));
      set_class(in, "shuffle/vote");
      return true;
    }
    if (name == "activemask") {
      dst(op(0), 4);
      in.run = active_mask;
      set_class(in, "shuffle/vote");
      return true;
    }
    if (name == "elect") {
      dst(op(0), 4);
      in.run = elect;
      member_mask(op(1));
      set_class(in, "shuffle/vote");
      return true;
    }
    if (name == "ldmatrix" || name == "stmatrix") {
      if (has("m16n16") || has("m8n16") || has("m16n8") || type_name() != "b16") return false;
      in.flow = Flow::WarpAligned;
      in.trans = has("trans");
      in.space = Space::Shared;
      if (name == "ldmatrix") {
        dst(op(0), 4);
        address(in, op(1));
        in.run = ldmatrix;
      } else {
        address(in, op(0));
        src(op(1), 4);
        in.run = stmatrix;
      }
      note_granule(in, 16);
      set_class(in, name);
      return true;
    }
    if (name == "movmatrix") {
      in.flow = Flow::WarpAligned;
      dst(op(0), 4);
      src(op(1), 4);
      in.run = movmatrix;
      set_class(in, "move");
      return true;
    }
    if (name == "mma") {
      if (has("sp") || st_->text.find("::") != std::string::npos) return false;
      static const std::map<std::string, MmaType> types = {
          {"f16", MmaType::F16}, {"bf16", MmaType::BF16}, {"tf32", MmaType::TF32}, {"s8", MmaType::S8},
          {"u8", MmaType::U8},   {"f64", MmaType::F64},   {"e4m3", MmaType::E4M3}, {"e5m2", MmaType::E5M2},
          {"f32", MmaType::F32}, {"s32", MmaType::S32}};
      std::vector<MmaType> found;
      std::string shape;
      for (auto& p : st_->opcode) {
        auto it = types.find(p);
        if (it != types.end()) found.push_back(it->second);
        if (p[0] == 'm' && p.size() > 3 && isdigit((unsigned char)p[1])) shape = p;
      }
      int m = 0, n = 0, k = 0;
      if (std::sscanf(shape.c_str(), "m%dn%dk%d", &m, &n, &k) != 3 || found.size() != 4 || n != 8) return false;
      if (!has("row") || !has("col")) return false;
      if (m == 8 && k == 4 && found[1] != MmaType::F64) return false;
      in.m = (u16)m;
      in.n = (u16)n;
      in.k = (u16)k;
      in.mode2 = (u8)found[0];
      in.type = (u8)found[1];
      in.type2 = (u8)found[2];
      in.mode = (u8)found[3];
      u32 ab = found[1] == MmaType::F64 ? 8 : 4, cd = found[0] == MmaType::F64 ? 8 : 4;
      dst(op(0), cd);
      src(op(1), ab);
      src(op(2), ab);
      src(op(3), cd);
      auto per = [](MmaType x) {
        return x == MmaType::F16 || x == MmaType::BF16 ? 2 : x == MmaType::TF32 || x == MmaType::F64 ? 1 : 4;
      };
      auto accumulators = [&](MmaType x) { return m * 8 / 32 / (x == MmaType::F16 ? 2 : 1); };
      size_t want = (size_t)((m + 8) * k / 32 / per(found[1]) + accumulators(found[3]));
      if (k > 32 || (m != 8 && m != 16) || src_.size() != want || dst_.size() != (size_t)accumulators(found[0]))
        fail("mma operand count");
      in.run = found[0] == MmaType::S32 ? mma_integer : mma_float;
      in.flow = Flow::WarpAligned;
      const char* ab_name = found[1] == MmaType::F16    ? "f16"
                            : found[1] == MmaType::BF16 ? "bf16"
                            : found[1] == MmaType::TF32 ? "tf32"
                            : found[1] == MmaType::F64  ? "f64"
                            : found[1] == MmaType::S8   ? "s8"
                            : found[1] == MmaType::U8   ? "u8"
                                                        : "fp8";
      set_class(in, "mma " + shape + " " + ab_name);
      return true;
    }
    return false;
  }
  bool move(Instr& in) {
    set_class(in, "move");
    std::string t = type_name();
    u32 bytes = type_bytes(t);
    if (t == "pred") {
      dst(op(0), 0);
      src(op(1), 0);
      in.run = move_predicate;
      return true;
    }
    if (op(0).kind == Operand::Vector && op(1).kind == Operand::Vector) {
      dst(op(0), ANY);
      src(op(1), ANY);
      in.run = move_vector;
      return true;
    }
    if (op(0).kind == Operand::Vector) {
      dst(op(0), ANY);
      src(op(1), bytes);
      in.run = move_unpack;
      in.mode = (u8)(bytes / op(0).items.size());
      return true;
    }
    if (op(1).kind == Operand::Vector) {
      size_t part = bytes / op(1).items.size();
      dst(op(0), bytes);
      src(op(1), (u32)part);
      in.run = move_pack;
      return true;
    }
    if (op(1).kind == Operand::Special &&
        (op(1).name.compare(0, 6, "%clock") == 0 || op(1).name.compare(0, 12, "%globaltimer") == 0)) {
      dst(op(0), bytes);
      in.run = read_clock;
      return true;
    }
    dst(op(0), bytes);
    if (op(1).kind == Operand::Name) fail("address of the function or label " + op(1).name);
    Ref s = bind(op(1), op(1).kind == Operand::Special ? ANY : bytes, t[0] == 'f');
    src_.push_back(s);
    if (s.bytes != bytes) {
      in.run = move_vector;
      return true;
    }
    in.run = bytes == 1   ? (Handler)move_value<u8>
             : bytes == 2 ? (Handler)move_value<u16>
             : bytes == 4 ? (Handler)move_value<u32>
                          : (Handler)move_value<u64>;
    return bytes <= 8;
  }
  bool conversion(Instr& in) {
    set_class(in, "convert");
    std::string to = type_name(0), from = type_name(1);
    if (st_->opcode.size() > 1 && st_->opcode[1] == "pack") {  // cvt.pack.sat.u8.s32.b32 d, a, b, c
      std::string third = type_name(2);
      u32 bits = type_bytes(to) * 8;
      if (from != "s32" || bits > 16) return false;
      dst(op(0), 4);
      src(op(1), 4);
      src(op(2), 4);
      if (op_count() > 3) src(op(3), 4);
      in.type = (u8)type_of(to);
      in.sat = true;
      in.k = (u16)bits;
      in.run = [](Machine& m, const Instr& i, u32 mask) {
        for (int l = 0; l < 32; ++l) {
          if (!(mask >> l & 1)) continue;
          u64 field = (1ull << i.k) - 1;
          u64 a = convert(i, m.read_raw(i.src[0], l), Type::S32, (Type)i.type) & field,
              b = convert(i, m.read_raw(i.src[1], l), Type::S32, (Type)i.type) & field;
          u64 c = i.src_count > 2 ? m.read_raw(i.src[2], l) : 0;
          m.write_raw(i.dst[0], l, (u32)(c << (2 * i.k) | a << i.k | b));
        }
      };
      return true;
    }
    Type t = type_of(to), f = type_of(from);
    if (t == Type::Other || f == Type::Other) return false;
    in.type = (u8)t;
    in.type2 = (u8)f;
    bool fp8_to = t == Type::E4M3x2 || t == Type::E5M2x2, pair_to = t == Type::F16x2 || t == Type::BF16x2 || fp8_to;
    if (pair_to) {
      if (op_count() > 3 || has("rs")) return false;
      dst(op(0), ANY);
      src(op(1), f == Type::F32 ? 4 : ANY, true);
      if (f == Type::F32) src(op(2), 4, true);
      in.run = cvt_pack2;
      return true;
    }
    dst(op(0), ANY);
    bool from_float = !is_integer(f);
    src(op(1), op(1).kind == Operand::Register || op(1).kind == Operand::Special ? ANY : type_bytes(from), from_float);
    in.flag = has("rni") || has("rzi") || has("rmi") || has("rpi");
    in.run = cvt;
    bool exact_width = dst_[0].bytes == type_bytes(to) && src_[0].bytes == type_bytes(from);
    bool plain = exact_width && !in.sat && !in.relu && !in.ftz && !in.flag && in.rounding == Rounding::Nearest;
    if (!plain) return true;
    if (t == Type::F16 && f == Type::F32)
      in.run = cvt_f32_to_half;
    else if (t == Type::F32 && f == Type::F16)
      in.run = cvt_half_to_f32;
    else if (t == Type::BF16 && f == Type::F32)
      in.run = cvt_f32_to_bf16;
    else if (t == Type::F32 && f == Type::BF16)
      in.run = cvt_bf16_to_f32;
    else if (t == Type::F64 && f == Type::F32)
      in.run = cvt_simple<f64, f32>;
    else if (t == Type::F32 && f == Type::F64)
      in.run = cvt_simple<f32, f64>;
    else if (t == Type::F32 && f == Type::S32)
      in.run = cvt_simple<f32, s32>;
    else if (t == Type::F32 && f == Type::U32)
      in.run = cvt_simple<f32, u32>;
    else if (t == Type::F64 && f == Type::S32)
      in.run = cvt_simple<f64, s32>;
    else if ((t == Type::S64 || t == Type::U64) && f == Type::S32)
      in.run = cvt_simple<s64, s32>;
    else if ((t == Type::S64 || t == Type::U64) && f == Type::U32)
      in.run = cvt_simple<u64, u32>;
    else if ((t == Type::S32 || t == Type::U32) && (f == Type::S64 || f == Type::U64))
      in.run = cvt_simple<u32, u64>;
    else if ((t == Type::S32 || t == Type::U32) && f == Type::S16)
      in.run = cvt_simple<s32, s16>;
    else if ((t == Type::S32 || t == Type::U32) && f == Type::U16)
      in.run = cvt_simple<u32, u16>;
    else if ((t == Type::S16 || t == Type::U16) && (f == Type::S32 || f == Type::U32))
      in.run = cvt_simple<u16, u32>;
    return true;
  }
  template <class T>
  static CompareFn compare_table(Cmp c) {
    switch (c) {
      case Cmp::Eq:
        return compare_lanes<T, Cmp::Eq>;
      case Cmp::Lt:
        return compare_lanes<T, Cmp::Lt>;
      case Cmp::Le:
        return compare_lanes<T, Cmp::Le>;
      case Cmp::Gt:
        return compare_lanes<T, Cmp::Gt>;
      case Cmp::Ge:
        return compare_lanes<T, Cmp::Ge>;
      case Cmp::LtGt:
        return compare_lanes<T, Cmp::LtGt>;
      default:
        return compare_lanes<T, Cmp::Num>;
    }
  }
  template <class Format, int shift, class Word>
  static CompareFn compare_half_table(Cmp c) {
    switch (c) {
      case Cmp::Eq:
        return compare_half<Format, Cmp::Eq, shift, Word>;
      case Cmp::Lt:
        return compare_half<Format, Cmp::Lt, shift, Word>;
      case Cmp::Le:
        return compare_half<Format, Cmp::Le, shift, Word>;
      case Cmp::Gt:
        return compare_half<Format, Cmp::Gt, shift, Word>;
      case Cmp::Ge:
        return compare_half<Format, Cmp::Ge, shift, Word>;
      case Cmp::LtGt:
        return compare_half<Format, Cmp::LtGt, shift, Word>;
      default:
        return compare_half<Format, Cmp::Num, shift, Word>;
    }
  }
  bool comparison(Instr& in, const std::string& name) {
    bool is_set = name == "set";
    std::string t = type_name(is_set ? 1 : 0);
    bool is_float = t == "f32" || t == "f64" || t == "f16" || t == "bf16" || t == "f16x2" || t == "bf16x2";
    struct Entry {
      const char* name;
      Cmp op;
      bool invert;
    };
    static const Entry ordered_ops[] = {{"eq", Cmp::Eq, false},   {"lt", Cmp::Lt, false}, {"le", Cmp::Le, false},
                                        {"gt", Cmp::Gt, false},   {"ge", Cmp::Ge, false}, {"lo", Cmp::Lt, false},
                                        {"ls", Cmp::Le, false},   {"hi", Cmp::Gt, false}, {"hs", Cmp::Ge, false},
                                        {"equ", Cmp::LtGt, true}, {"neu", Cmp::Eq, true}, {"ltu", Cmp::Ge, true},
                                        {"leu", Cmp::Gt, true},   {"gtu", Cmp::Le, true}, {"geu", Cmp::Lt, true},
                                        {"num", Cmp::Num, false}, {"nan", Cmp::Num, true}};
    Cmp c = Cmp::Eq;
    bool found = false;
    const std::string& word = st_->opcode[1];
    for (auto& e : ordered_ops)
      if (word == e.name) {
        c = e.op;
        in.flag = e.invert;
        found = true;
      }
    if (word == "ne") {
      found = true;
      if (is_float)
        c = Cmp::LtGt;
      else {
        c = Cmp::Eq;
        in.flag = true;
      }
    }
    if (!found) return false;
    u32 bytes = type_bytes(t);
    in.mode = has("and") ? 1 : has("or") ? 2 : has("xor") ? 3 : 0;
    set_class(in, is_float ? (t == "f64" ? "fp64" : t == "f32" ? "fp32" : "fp16") : "integer");
    if (t == "f16x2" || t == "bf16x2") {
      if (is_set) return set_half2(in, t, c);
      if (op(0).kind != Operand::Pair) return false;
      dst(op(0), 0);
      src(op(1), 4);
      src(op(2), 4);
      in.type = t == "bf16x2";
      in.k = (u16)c;
      in.run = [](Machine& m, const Instr& i, u32 mask) {
        Cmp op = (Cmp)i.k;
        CompareFn low = i.type ? compare_half_table<BFloat, 0, u32>(op) : compare_half_table<Half, 0, u32>(op);
        CompareFn high = i.type ? compare_half_table<BFloat, 16, u32>(op) : compare_half_table<Half, 16, u32>(op);
        u32 a = low(m.at<char>(i.src[0]), m.at<char>(i.src[1]), false),
            b = high(m.at<char>(i.src[0]), m.at<char>(i.src[1]), false);
        m.set_predicate(i.dst[0], i.flag ? ~a : a, mask);
        m.set_predicate(i.dst[1], i.flag ? ~b : b, mask);
      };
      return true;
    }
    if (t == "f32")
      in.compare = compare_table<f32>(c);
    else if (t == "f64")
      in.compare = compare_table<f64>(c);
    else if (t == "f16")
      in.compare = compare_half_table<Half, 0, u16>(c);
    else if (t == "bf16")
      in.compare = compare_half_table<BFloat, 0, u16>(c);
    else if (t == "s16")
      in.compare = compare_table<s16>(c);
    else if (t == "u16" || t == "b16")
      in.compare = compare_table<u16>(c);
    else if (t == "s32")
      in.compare = compare_table<s32>(c);
    else if (t == "u32" || t == "b32")
      in.compare = compare_table<u32>(c);
    else if (t == "s64")
      in.compare = compare_table<s64>(c);
    else if (t == "u64" || t == "b64")
      in.compare = compare_table<u64>(c);
    else
      return false;
    if (is_set) {
      std::string d = type_name(0);
      dst(op(0), type_bytes(d));
      in.immediate = d == "f32" ? 0x3f800000 : d == "f16" ? 0x3c00 : d == "bf16" ? 0x3f80 : -1;
      in.run = set_value;
    } else {
      dst(op(0), 0);
      in.run = setp;
    }
    src(op(1), bytes, is_float);
    src(op(2), bytes, is_float);
    if (op_count() > 3) src(op(3), 0);
    return true;
  }
  bool set_half2(Instr& in, const std::string& t, Cmp c) {  // set.op.{f16x2,bf16x2,u32,s32}.{f16x2,bf16x2}
    std::string d = type_name(0);
    dst(op(0), 4);
    src(op(1), 4);
    src(op(2), 4);
    in.type = t == "bf16x2";
    in.k = (u16)c;
    in.immediate = d == "f16x2" ? 0x3c00 : d == "bf16x2" ? 0x3f80 : 0xffff;
    in.run = [](Machine& m, const Instr& i, u32 mask) {
      Cmp op = (Cmp)i.k;
      CompareFn low = i.type ? compare_half_table<BFloat, 0, u32>(op) : compare_half_table<Half, 0, u32>(op);
      CompareFn high = i.type ? compare_half_table<BFloat, 16, u32>(op) : compare_half_table<Half, 16, u32>(op);
      u32 a = low(m.at<char>(i.src[0]), m.at<char>(i.src[1]), false),
          b = high(m.at<char>(i.src[0]), m.at<char>(i.src[1]), false);
      if (i.flag) {
        a = ~a;
        b = ~b;
      }
      for (int l = 0; l < 32; ++l)
        if (mask >> l & 1)
          m.at<u32>(i.dst[0])[l] = ((a >> l & 1) ? (u32)i.immediate : 0) | ((b >> l & 1) ? (u32)i.immediate << 16 : 0);
    };
    return true;
  }
  bool half_type(Instr& in, const std::string& name, const std::string& t) {
    bool pair = t == "f16x2" || t == "bf16x2";
    if (!pair && t != "f16" && t != "bf16") return false;
    static const std::map<std::string, std::pair<HalfOp, int>> ops = {
        {"add", {HalfOp::Add, 2}}, {"sub", {HalfOp::Sub, 2}},  {"mul", {HalfOp::Mul, 2}}, {"fma", {HalfOp::Fma, 3}},
        {"min", {HalfOp::Min, 2}}, {"max", {HalfOp::Max, 2}},  {"neg", {HalfOp::Neg, 1}}, {"abs", {HalfOp::Abs, 1}},
        {"ex2", {HalfOp::Ex2, 1}}, {"tanh", {HalfOp::Tanh, 1}}};
    auto it = ops.find(name);
    if (it == ops.end()) return false;
    in.mode = (u8)it->second.first;
    bool brain = t[0] == 'b';
    Handler h = brain ? (pair ? (Handler)half_arithmetic<BFloat, u32> : (Handler)half_arithmetic<BFloat, u16>)
                      : (pair ? (Handler)half_arithmetic<Half, u32> : (Handler)half_arithmetic<Half, u16>);
    return simple(in, h, pair ? 4 : 2, (size_t)it->second.second, name == "ex2" || name == "tanh" ? "special function" : "fp16",
                  true);
  }
  template <class T, class Op>
  Handler float_handler(const Instr& in) {
    if (in.rounding != Rounding::Nearest || in.sat) return float_binary_general<T, Op>;
    if (in.ftz && sizeof(T) == 4) return float_binary_ftz<Op>;
    return float_binary<T, Op>;
  }
  bool floating(Instr& in, const std::string& name, const std::string& t) {
    bool wide = t == "f64";
    std::string klass = wide ? "fp64" : "fp32";
    u32 bytes = wide ? 8 : 4;
    if (t == "f32x2") {
      in.mode = name == "add" ? 0 : name == "sub" ? 1 : name == "mul" ? 2 : 3;
      if (in.mode == 3 && name != "fma") return false;
      return simple(in, f32x2_arithmetic, 8, in.mode == 3 ? 3 : 2, klass);
    }
    if (name == "add")
      return simple(in, wide ? float_handler<f64, Add>(in) : float_handler<f32, Add>(in), bytes, 2, klass, true);
    if (name == "sub")
      return simple(in, wide ? float_handler<f64, Sub>(in) : float_handler<f32, Sub>(in), bytes, 2, klass, true);
    if (name == "mul")
      return simple(in, wide ? float_handler<f64, Mul>(in) : float_handler<f32, Mul>(in), bytes, 2, klass, true);
    if (name == "fma" || name == "mad") {
      bool general = in.rounding != Rounding::Nearest || in.sat;
      Handler h = wide      ? (general ? (Handler)float_fma_general<f64> : (Handler)float_fma<f64>)
                  : general ? (Handler)float_fma_general<f32>
                  : in.ftz  ? (Handler)float_fma_ftz
                            : (Handler)float_fma<f32>;
      return simple(in, h, bytes, 3, klass, true);
    }
    if (name == "div") {
      if (has("approx") || has("full")) return simple(in, div_f32_approx, 4, 2, "special function", true);
      return simple(in, wide ? float_handler<f64, Div>(in) : float_handler<f32, Div>(in), bytes, 2, klass, true);
    }
    if (name == "min" || name == "max") {
      in.mode = name == "max";
      if (op_count() == 4 && !wide) return simple(in, float_minmax3, 4, 3, klass, true);
      return simple(in, wide ? (Handler)float_minmax<f64> : (Handler)float_minmax<f32>, bytes, 2, klass, true);
    }
    if (name == "neg")
      return simple(in, wide ? (Handler)UNARY(f64, f64, -a) : (Handler)UNARY(f32, f32, -start(in, a)), bytes, 1, klass, true);
    if (name == "abs")
      return simple(in, wide ? (Handler)UNARY(f64, f64, std::fabs(a)) : (Handler)UNARY(f32, f32, std::fabs(start(in, a))),
                    bytes, 1, klass, true);
    if (name == "copysign")
      return simple(in, wide ? (Handler)BINARY(f64, std::copysign(b, a)) : (Handler)BINARY(f32, std::copysign(b, a)), bytes, 2,
                    klass, true);
    static const std::map<std::string, Special1> specials = {
        {"rcp", Special1::Rcp}, {"sqrt", Special1::Sqrt}, {"rsqrt", Special1::Rsqrt}, {"ex2", Special1::Ex2},
        {"lg2", Special1::Lg2}, {"sin", Special1::Sin},   {"cos", Special1::Cos},     {"tanh", Special1::Tanh}};
    auto it = specials.find(name);
    if (it != specials.end()) {
      in.mode = (u8)it->second;
      bool exact_form = !has("approx") && (name == "rcp" || name == "sqrt");
      Handler h = wide ? (Handler)special_f64 : exact_form ? (Handler)rcp_sqrt_f32_rounded : (Handler)special_f32;
      return simple(in, h, bytes, 1, exact_form ? klass : "special function", true);
    }
    if (name == "selp" || name == "slct") return select(in, name, t);
    if (name == "testp") {
      dst(op(0), 0);
      src(op(1), bytes);
      const std::string& what = st_->opcode[1];
      in.mode = what == "finite"       ? 0
                : what == "infinite"   ? 1
                : what == "number"     ? 2
                : what == "notanumber" ? 3
                : what == "normal"     ? 4
                                       : 5;
      in.run = [](Machine& m, const Instr& i, u32 mask) {
        u32 bits = 0;
        for (int l = 0; l < 32; ++l) {
          int c;
          if (i.src[0].bytes == 8)
            c = std::fpclassify(m.at<f64>(i.src[0])[l]);
          else
            c = std::fpclassify(m.at<f32>(i.src[0])[l]);
          bool r = i.mode == 0   ? c != FP_NAN && c != FP_INFINITE
                   : i.mode == 1 ? c == FP_INFINITE
                   : i.mode == 2 ? c != FP_NAN
                   : i.mode == 3 ? c == FP_NAN
                   : i.mode == 4 ? c == FP_NORMAL
                                 : c == FP_SUBNORMAL;
          bits |= (u32)r << l;
        }
        m.set_predicate(i.dst[0], bits, mask);
      };
      set_class(in, klass);
      return true;
    }
    return false;
  }
  bool select(Instr& in, const std::string& name, const std::string& t) {
    u32 bytes = type_bytes(t);
    set_class(in, "move");
    dst(op(0), bytes);
    src(op(1), bytes, t[0] == 'f');
    src(op(2), bytes, t[0] == 'f');
    if (name == "selp") {
      src(op(3), 0);
      in.run = bytes == 2 ? (Handler)selp<u16> : bytes == 4 ? (Handler)selp<u32> : (Handler)selp<u64>;
      return true;
    }
    src(op(3), 4);
    in.flag = type_name(1) == "f32";
    in.run = [](Machine& m, const Instr& i, u32 mask) {
      for (int l = 0; l < 32; ++l) {
        if (!(mask >> l & 1)) continue;
        u32 c = m.at<u32>(i.src[2])[l];
        bool first = i.flag ? bit_cast<f32>(c) >= 0.0f : (s32)c >= 0;
        m.write_raw(i.dst[0], l, m.read_raw(i.src[first ? 0 : 1], l));
      }
    };
    return true;
  }
#define BY_TYPE(MACRO, ...)                                      \
  (t == "s16"                 ? (Handler)MACRO(s16, __VA_ARGS__) \
   : t == "u16" || t == "b16" ? (Handler)MACRO(u16, __VA_ARGS__) \
   : t == "s32"               ? (Handler)MACRO(s32, __VA_ARGS__) \
   : t == "u32" || t == "b32" ? (Handler)MACRO(u32, __VA_ARGS__) \
   : t == "s64"               ? (Handler)MACRO(s64, __VA_ARGS__) \
   : t == "u64" || t == "b64" ? (Handler)MACRO(u64, __VA_ARGS__) \
                              : (Handler) nullptr)
#define UNARY_SAME(T, ...) UNARY(T, T, __VA_ARGS__)
#define TERNARY_SAME(T, ...) TERNARY(T, T, T, T, __VA_ARGS__)
#define SHIFT(T, ...) \
  [](Machine& m, const Instr& in, u32 mask) { map_shift<T>(m, in, mask, [](T a, u32 b) -> T { return (T)(__VA_ARGS__); }); }
  template <class T, class F>
  static void map_shift(Machine& m, const Instr& in, u32 mask, F f) {
    T* d = m.at<T>(in.dst[0]);
    const T* a = m.at<T>(in.src[0]);
    const u32* b = m.at<u32>(in.src[1]);
    if (mask == ALL_LANES)
      for (int i = 0; i < 32; ++i) d[i] = f(a[i], b[i]);
    else
      for (int i = 0; i < 32; ++i)
        if (mask >> i & 1) d[i] = f(a[i], b[i]);
  }
  bool integer(Instr& in, const std::string& name, const std::string& t) {
    u32 bytes = type_bytes(t);
    const std::string klass = "integer";
    in.is_signed = t[0] == 's';
    bool carry_out = has("cc");
    if (carry_out || name == "addc" || name == "subc" || name == "madc") {
      in.flag = name == "addc" || name == "subc" || name == "madc";
      in.mode2 = carry_out;
      in.mode = name.substr(0, 3) == "add" ? 0 : name.substr(0, 3) == "sub" ? 1 : has("hi") ? 3 : 2;
      return simple(in, bytes == 4 ? (Handler)carry_arithmetic<u32> : (Handler)carry_arithmetic<u64>, bytes,
                    in.mode >= 2 ? 3 : 2, klass);
    }
    if (t == "u16x2" || t == "s16x2") {
      if (name != "add" && name != "min" && name != "max") return false;
      in.mode = name == "add" ? 0 : name == "min" ? 1 : 2;
      return simple(in, t == "s16x2" ? (Handler)video_minmax2<s16> : (Handler)video_minmax2<u16>, 4, 2, klass);
    }
    if (name == "add") {
      if (in.sat)
        return simple(in, BINARY(s32, std::max<s64>(std::min<s64>((s64)a + b, 2147483647), -2147483648ll)), 4, 2, klass);
      return simple(in,
                    bytes == 2   ? (Handler)BINARY(u16, a + b)
                    : bytes == 4 ? (Handler)BINARY(u32, a + b)
                                 : (Handler)BINARY(u64, a + b),
                    bytes, 2, klass);
    }
    if (name == "sub") {
      if (in.sat)
        return simple(in, BINARY(s32, std::max<s64>(std::min<s64>((s64)a - b, 2147483647), -2147483648ll)), 4, 2, klass);
      return simple(in,
                    bytes == 2   ? (Handler)BINARY(u16, a - b)
                    : bytes == 4 ? (Handler)BINARY(u32, a - b)
                                 : (Handler)BINARY(u64, a - b),
                    bytes, 2, klass);
    }
    if (name == "mul" || name == "mad") {
      bool mad = name == "mad";
      if (has("wide")) {
        dst(op(0), bytes * 2);
        src(op(1), bytes);
        src(op(2), bytes);
        if (mad) src(op(3), bytes * 2);
        if (t == "s32")
          in.run = mad ? (Handler)TERNARY(s64, s32, s32, s64, (s64)a * b + c) : (Handler)BINARY_TO(s64, s32, (s64)a * b);
        else if (t == "u32")
          in.run = mad ? (Handler)TERNARY(u64, u32, u32, u64, (u64)a * b + c) : (Handler)BINARY_TO(u64, u32, (u64)a * b);
        else if (t == "s16")
          in.run = mad ? (Handler)TERNARY(s32, s16, s16, s32, (s32)a * b + c) : (Handler)BINARY_TO(s32, s16, (s32)a * b);
        else if (t == "u16")
          in.run = mad ? (Handler)TERNARY(u32, u16, u16, u32, (u32)a * b + c) : (Handler)BINARY_TO(u32, u16, (u32)a * b);
        set_class(in, klass);
        return in.run != nullptr;
      }
      if (has("hi")) {
        Handler h = t == "s32"   ? (mad ? (Handler)TERNARY_SAME(s32, (u32)(((s64)a * b) >> 32) + (u32)c)
                                        : (Handler)BINARY(s32, ((s64)a * b) >> 32))
                    : t == "u32" ? (mad ? (Handler)TERNARY_SAME(u32, (u32)(((u64)a * b) >> 32) + c)
                                        : (Handler)BINARY(u32, ((u64)a * b) >> 32))
                    : t == "s64" ? (mad ? (Handler)TERNARY_SAME(s64, (u64)(((__int128)a * b) >> 64) + (u64)c)
                                        : (Handler)BINARY(s64, ((__int128)a * b) >> 64))
                    : t == "u64" ? (mad ? (Handler)TERNARY_SAME(u64, (u64)(((unsigned __int128)a * b) >> 64) + c)
                                        : (Handler)BINARY(u64, ((unsigned __int128)a * b) >> 64))
                    : t == "s16" ? (mad ? nullptr : (Handler)BINARY(s16, ((s32)a * b) >> 16))
                                 : (mad ? nullptr : (Handler)BINARY(u16, ((u32)a * b) >> 16));
        return h && simple(in, h, bytes, mad ? 3 : 2, klass);
      }
      Handler h = bytes == 2   ? (mad ? (Handler)TERNARY_SAME(u16, (u32)a * b + c) : (Handler)BINARY(u16, (u32)a * b))
                  : bytes == 4 ? (mad ? (Handler)TERNARY_SAME(u32, a * b + c) : (Handler)BINARY(u32, a * b))
                               : (mad ? (Handler)TERNARY_SAME(u64, a * b + c) : (Handler)BINARY(u64, a * b));
      return simple(in, h, bytes, mad ? 3 : 2, klass);
    }
    if (name == "mul24" || name == "mad24") {
      bool mad = name == "mad24";
      if (has("hi")) {
        Handler h = t == "s32" ? (Handler)BINARY(s32, ((s64)((s32)((u32)a << 8) >> 8) * (s64)((s32)((u32)b << 8) >> 8)) >> 16)
                               : (Handler)BINARY(u32, ((u64)(a & 0xffffff) * (b & 0xffffff)) >> 16);
        return !mad && simple(in, h, 4, 2, klass);
      }
      if (t == "s32")
        return simple(
            in,
            mad ? (Handler)TERNARY_SAME(s32, (u32)((s64)((s32)((u32)a << 8) >> 8) * (s64)((s32)((u32)b << 8) >> 8)) + (u32)c)
                : (Handler)BINARY(s32, (s64)((s32)((u32)a << 8) >> 8) * (s64)((s32)((u32)b << 8) >> 8)),
            4, mad ? 3 : 2, klass);
      return simple(in,
                    mad ? (Handler)TERNARY_SAME(u32, (a & 0xffffff) * (b & 0xffffff) + c)
                        : (Handler)BINARY(u32, (a & 0xffffff) * (b & 0xffffff)),
                    4, mad ? 3 : 2, klass);
    }
    if (name == "sad") return simple(in, BY_TYPE(TERNARY_SAME, c + (a > b ? a - b : b - a)), bytes, 3, klass);
    if (name == "div")
      return simple(in,
                    BY_TYPE(BINARY, b == 0                                                         ? (decltype(a))-1
                                    : (b == (decltype(a))-1 && std::is_signed<decltype(a)>::value) ? (decltype(a))(0 - (u64)a)
                                                                                                   : a / b),
                    bytes, 2, klass);
    if (name == "rem")
      return simple(in,
                    BY_TYPE(BINARY, b == 0                                                         ? a
                                    : (b == (decltype(a))-1 && std::is_signed<decltype(a)>::value) ? 0
                                                                                                   : a % b),
                    bytes, 2, klass);
    if (name == "abs") return simple(in, BY_TYPE(UNARY_SAME, a < 0 ? (decltype(a))(0 - (u64)a) : a), bytes, 1, klass);
    if (name == "neg") return simple(in, BY_TYPE(UNARY_SAME, 0 - (u64)a), bytes, 1, klass);
    if (name == "min")
      return simple(in, in.relu ? (Handler)BINARY(s32, std::max(std::min(a, b), 0)) : BY_TYPE(BINARY, std::min(a, b)), bytes, 2,
                    klass);
    if (name == "max")
      return simple(in, in.relu ? (Handler)BINARY(s32, std::max(std::max(a, b), 0)) : BY_TYPE(BINARY, std::max(a, b)), bytes, 2,
                    klass);
    if (name == "and" || name == "or" || name == "xor" || name == "not") {
      if (t == "pred") {
        dst(op(0), 0);
        src(op(1), 0);
        if (name != "not") src(op(2), 0);
        in.mode = name == "and" ? 1 : name == "or" ? 2 : name == "xor" ? 3 : 0;
        in.run = [](Machine& m, const Instr& i, u32 mask) {
          u32 a = m.predicate(i.src[0]);
          m.set_predicate(i.dst[0], i.mode == 0 ? ~a : combine_predicates(a, m.predicate(i.src[1]), i.mode), mask);
        };
        set_class(in, klass);
        return true;
      }
      Handler h = name == "and"   ? BY_TYPE(BINARY, a & b)
                  : name == "or"  ? BY_TYPE(BINARY, a | b)
                  : name == "xor" ? BY_TYPE(BINARY, a ^ b)
                                  : BY_TYPE(UNARY_SAME, ~a);
      return simple(in, h, bytes, name == "not" ? 1 : 2, klass);
    }
    if (name == "cnot") return simple(in, BY_TYPE(UNARY_SAME, a == 0), bytes, 1, klass);
    if (name == "lop3") {
      size_t i = 0;
      in.mode = has("and") ? 1 : 2;
      dst(op(i++), 4);
      src(op(i), 4);
      src(op(i + 1), 4);
      src(op(i + 2), 4);
      in.immediate = (s64)op(i + 3).bits;
      if (dst_.size() > 1) src(op(i + 4), 0);
      in.run = lop3;
      set_class(in, klass);
      return true;
    }
    if (name == "shl" || name == "shr") {
      dst(op(0), bytes);
      src(op(1), bytes);
      src(op(2), 4);
      set_class(in, klass);
      if (name == "shl")
        in.run = bytes == 2   ? (Handler)SHIFT(u16, b >= 16 ? 0 : (u32)a << b)
                 : bytes == 4 ? (Handler)SHIFT(u32, b >= 32 ? 0 : a << b)
                              : (Handler)SHIFT(u64, b >= 64 ? 0 : a << b);
      else
        in.run = BY_TYPE(SHIFT, b >= sizeof(a) * 8 ? (a < 0 ? -1 : 0) : a >> b);
      return true;
    }
    if (name == "shf") {
      in.flag = has("wrap");
      bool left = has("l");
      Handler h = left ? (Handler)TERNARY_SAME(u32,
                                               [&] {
                                                 u32 s = in.flag ? c & 31 : std::min<u32>(c, 32);
                                                 return (u32)((((u64)b << 32 | a) << s) >> 32);
                                               }())
                       : (Handler)TERNARY_SAME(u32, [&] {
                           u32 s = in.flag ? c & 31 : std::min<u32>(c, 32);
                           return (u32)(((u64)b << 32 | a) >> s);
                         }());
      return simple(in, h, 4, 3, klass);
    }
    if (name == "prmt") {
      in.mode = has("f4e") ? 1 : has("b4e") ? 2 : has("rc8") ? 3 : has("ecl") ? 4 : has("ecr") ? 5 : has("rc16") ? 6 : 0;
      return simple(in, TERNARY_SAME(u32, permute_bytes(a, b, c, in.mode)), 4, 3, klass);
    }
    if (name == "bfe") {
      dst(op(0), bytes);
      src(op(1), bytes);
      src(op(2), 4);
      src(op(3), 4);
      in.run = t == "s32"   ? (Handler)TERNARY(s32, s32, u32, u32, bit_field_extract(a, b, c))
               : t == "u32" ? (Handler)TERNARY(u32, u32, u32, u32, bit_field_extract(a, b, c))
               : t == "s64" ? (Handler)TERNARY(s64, s64, u32, u32, bit_field_extract(a, b, c))
                            : (Handler)TERNARY(u64, u64, u32, u32, bit_field_extract(a, b, c));
      set_class(in, klass);
      return true;
    }
    if (name == "bfi") {
      dst(op(0), bytes);
      src(op(1), bytes);
      src(op(2), bytes);
      src(op(3), 4);
      src(op(4), 4);
      in.run = [](Machine& m, const Instr& i, u32 mask) {
        for (int l = 0; l < 32; ++l) {
          if (!(mask >> l & 1)) continue;
          u64 a = m.read_raw(i.src[0], l), b = m.read_raw(i.src[1], l);
          u32 c = (u32)m.read_raw(i.src[2], l), d = (u32)m.read_raw(i.src[3], l);
          m.write_raw(i.dst[0], l,
                      i.src[0].bytes == 4 ? bit_field_insert<u32>((u32)a, (u32)b, c, d) : bit_field_insert<u64>(a, b, c, d));
        }
      };
      set_class(in, klass);
      return true;
    }
    if (name == "bmsk") {
      in.flag = has("wrap");
      return simple(in,
                    BINARY(u32,
                           [&]() -> u32 {
                             u32 p = in.flag ? a & 31 : a, n = in.flag ? b & 31 : b;
                             if (p >= 32 || n == 0) return 0;
                             u32 w = n >= 32 ? ~0u : (1u << n) - 1;
                             return w << p;
                           }()),
                    4, 2, klass);
    }
    if (name == "szext") {
      in.flag = has("wrap");
      if (t == "s32")
        return simple(in,
                      BINARY(s32,
                             [&]() -> s32 {
                               u32 n = in.flag ? (u32)b & 31 : std::min<u32>((u32)b, 32);
                               if (n == 0) return 0;
                               if (n == 32) return a;
                               return (s32)((u32)a << (32 - n)) >> (32 - n);
                             }()),
                      4, 2, klass);
      return simple(in,
                    BINARY(u32,
                           [&]() -> u32 {
                             u32 n = in.flag ? b & 31 : std::min<u32>(b, 32);
                             return n == 32 ? a : a & ((1u << n) - 1);
                           }()),
                    4, 2, klass);
    }
    if (name == "popc" || name == "clz" || name == "bfind") {
      dst(op(0), 4);
      src(op(1), bytes);
      in.flag = has("shiftamt");
      if (name == "popc")
        in.run =
            bytes == 4 ? (Handler)UNARY(u32, u32, __builtin_popcount(a)) : (Handler)UNARY(u32, u64, __builtin_popcountll(a));
      else if (name == "clz")
        in.run = bytes == 4 ? (Handler)UNARY(u32, u32, a ? __builtin_clz(a) : 32)
                            : (Handler)UNARY(u32, u64, a ? __builtin_clzll(a) : 64);
      else
        in.run = t == "s32"   ? (Handler)UNARY(u32, s32, find_bit(a, in.flag))
                 : t == "u32" ? (Handler)UNARY(u32, u32, find_bit(a, in.flag))
                 : t == "s64" ? (Handler)UNARY(u32, s64, find_bit(a, in.flag))
                              : (Handler)UNARY(u32, u64, find_bit(a, in.flag));
      set_class(in, klass);
      return true;
    }
    if (name == "brev") {
      return simple(in,
                    bytes == 4 ? (Handler)UNARY(u32, u32,
                                                [&] {
                                                  u32 r = 0;
                                                  for (int i = 0; i < 32; ++i) r |= (a >> i & 1) << (31 - i);
                                                  return r;
                                                }())
                               : (Handler)UNARY(u64, u64,
                                                [&] {
                                                  u64 r = 0;
                                                  for (int i = 0; i < 64; ++i) r |= (a >> i & 1) << (63 - i);
                                                  return r;
                                                }()),
                    bytes, 1, klass);
    }
    if (name == "dp4a" || name == "dp2a") {
      in.mode = name == "dp4a" ? 4 : 2;
      in.flag = has("hi");
      in.type = type_name(0) == "s32";
      in.type2 = type_name(1) == "s32";
      return simple(in, dp4a, 4, 3, klass);
    }
    if (name == "selp" || name == "slct") return select(in, name, t);
    return false;
  }
};
