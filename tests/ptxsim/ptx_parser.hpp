// PTX text -> Module: functions, variables, statements with resolved names.
// Knows the grammar only; what an opcode means is in ptx_instructions.hpp.
#pragma once
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

#include "ptx_numeric.hpp"

struct PtxError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum class Space : u8 { None, Reg, Param, Local, Shared, Global, Const, Generic };

struct Variable {
  std::string name;
  Space space = Space::None;
  std::string element_type;  // "b8", "f32", ...
  u64 bytes = 0;             // 0 for an unsized extern array
  u32 align = 1;
  bool unsized = false;
  std::vector<u8> initial;  // empty: zero
  struct Address {
    u64 at;
    std::string symbol;
    s64 offset;
  };
  std::vector<Address> addresses;  // initialiser entries that are addresses of other variables
  int function = -1;               // -1: module scope
};

struct Operand {
  enum Kind : u8 { None, Register, Special, Integer, Float32, Float64, Variable, Name, Vector, Address, List, Pair, Sink };
  Kind kind = None;
  bool negated = false;  // !p
  int index = -1;        // register number in its function, or variable number
  u64 bits = 0;          // immediate bits
  s64 offset = 0;        // addresses
  std::string name;
  std::vector<Operand> items;  // Vector, List, Pair; Address keeps its base in items[0]
};

struct Statement {
  std::vector<std::string> opcode;  // split at '.', e.g. {"ld","global","v4","f32"}
  std::string text;                 // the whole opcode
  int guard = -1;
  bool guard_negated = false;
  std::vector<Operand> operands;
  int line = 0;
  int scope = 0;
};

struct Label {
  std::string name;
  int scope;
  int position;
};
struct BranchTargets {
  std::string name;
  int scope;
  std::vector<std::string> labels;
};

struct Function {
  std::string name;
  bool is_kernel = false, defined = false;
  std::vector<int> params, results;  // variable numbers
  std::vector<u32> register_bytes;   // 0 = predicate
  std::vector<std::string> register_names;
  std::vector<Statement> statements;
  std::vector<Label> labels;
  std::vector<BranchTargets> branch_targets;
  std::vector<int> scope_parent{-1};
  int required_threads[3] = {0, 0, 0};
};

struct Module {
  std::string version, target;
  std::vector<Variable> variables;
  std::vector<std::unique_ptr<Function>> functions;
  std::unordered_map<std::string, int> function_by_name, variable_by_name;
};

inline u32 type_bytes(const std::string& t) {
  if (t == "pred") return 0;
  if (t.size() < 2) return 4;
  if (t.size() > 2 && t.substr(t.size() - 2) == "x2" && t != "f32x2") return t[0] == 'e' ? 2 : 4;
  if (t == "f32x2") return 8;
  if (t == "bf16") return 2;
  if (t == "tf32") return 4;
  if (t == "e4m3" || t == "e5m2") return 1;
  int bits = std::atoi(t.c_str() + 1);
  return bits ? (u32)bits / 8 : 4;
}

class Parser {
 public:
  explicit Parser(const std::string& source) : text_(without_comments(source)) {}

  Module parse() {
    push_scope();
    while (skip_space()) parse_top_level();
    return std::move(module_);
  }

 private:
  std::string text_;
  size_t at_ = 0;
  int line_ = 1;
  Module module_;
  Function* function_ = nullptr;
  int function_index_ = -1;
  struct Scope {
    int id;
    std::unordered_map<std::string, int> registers, variables;
  };
  std::vector<Scope> scopes_;

  static std::string without_comments(const std::string& s) {
    std::string out = s;
    size_t i = 0;
    bool in_string = false;
    while (i < out.size()) {
      if (in_string) {
        if (out[i] == '\\')
          ++i;
        else if (out[i] == '"')
          in_string = false;
        ++i;
        continue;
      }
      if (out[i] == '"') {
        in_string = true;
        ++i;
        continue;
      }
      if (out.compare(i, 2, "//") == 0) {
        while (i < out.size() && out[i] != '\n') out[i++] = ' ';
        continue;
      }
      if (out.compare(i, 2, "/*") == 0) {
        size_t end = out.find("*/", i + 2);
        end = end == std::string::npos ? out.size() : end + 2;
        for (; i < end; ++i)
          if (out[i] != '\n') out[i] = ' ';
        continue;
      }
      ++i;
    }
    return out;
  }

  [[noreturn]] void fail(const std::string& what) {
    size_t end = std::min(text_.size(), at_ + 40);
    throw PtxError("PTX line " + std::to_string(line_) + ": " + what + " near '" + text_.substr(at_, end - at_) + "'");
  }
  bool skip_space() {
    while (at_ < text_.size() && (isspace((unsigned char)text_[at_]) || text_[at_] == '\0')) {
      if (text_[at_] == '\n') ++line_;
      ++at_;
    }
    return at_ < text_.size();
  }
  char peek() {
    skip_space();
    return at_ < text_.size() ? text_[at_] : '\0';
  }
  bool accept(char c) {
    if (peek() == c) {
      ++at_;
      return true;
    }
    return false;
  }
  void expect(char c) {
    if (!accept(c)) fail(std::string("expected '") + c + "'");
  }
  void skip_line() {
    while (at_ < text_.size() && text_[at_] != '\n') ++at_;
  }
  void skip_past(char c) {
    while (at_ < text_.size() && text_[at_] != c) {
      if (text_[at_] == '\n') ++line_;
      ++at_;
    }
    if (at_ < text_.size()) ++at_;
  }
  static bool name_char(char c) { return isalnum((unsigned char)c) || c == '_' || c == '$' || c == '%'; }
  std::string word() {  // identifier or ".directive"; '.' and '::' only as parts of special registers and opcodes
    skip_space();
    size_t start = at_;
    if (at_ < text_.size() && text_[at_] == '.') ++at_;
    while (at_ < text_.size() && name_char(text_[at_])) ++at_;
    return text_.substr(start, at_ - start);
  }
  std::string opcode_word() {
    skip_space();
    size_t start = at_;
    while (at_ < text_.size() && (name_char(text_[at_]) || text_[at_] == '.' || text_[at_] == ':')) ++at_;
    return text_.substr(start, at_ - start);
  }
  void push_scope() {
    Scope s;
    s.id = 0;
    if (function_ && !scopes_.empty() && scopes_.size() > 1) {
      s.id = (int)function_->scope_parent.size();
      function_->scope_parent.push_back(scopes_.back().id);
    }
    scopes_.push_back(std::move(s));
  }
  int find_register(const std::string& n) {
    for (size_t i = scopes_.size(); i-- > 0;) {
      auto it = scopes_[i].registers.find(n);
      if (it != scopes_[i].registers.end()) return it->second;
    }
    return -1;
  }
  int find_variable(const std::string& n) {
    for (size_t i = scopes_.size(); i-- > 0;) {
      auto it = scopes_[i].variables.find(n);
      if (it != scopes_[i].variables.end()) return it->second;
    }
    return -1;
  }

  void parse_top_level() {
    std::string d = word();
    if (d == ".version") {
      skip_space();
      size_t s = at_;
      skip_line();
      module_.version = trimmed(text_.substr(s, at_ - s));
    } else if (d == ".target") {
      skip_space();
      size_t s = at_;
      skip_line();
      module_.target = trimmed(text_.substr(s, at_ - s));
    } else if (d == ".address_size" || d == ".file" || d == ".loc")
      skip_line();
    else if (d == ".section") {
      skip_past('{');
      skip_past('}');
    } else if (d == ".visible" || d == ".extern" || d == ".weak" || d == ".common") {
    } else if (d == ".entry" || d == ".func")
      parse_function(d == ".entry");
    else if (d == ".global" || d == ".const" || d == ".shared" || d == ".local")
      parse_variable(space_of(d));
    else if (d == ".pragma" || d == ".alias" || d == ".metadata_section")
      skip_past(';');
    else if (d.empty() && accept(';')) {
    } else if (d.empty())
      fail("unexpected text");
    else
      skip_past(';');
  }
  static std::string trimmed(std::string s) {
    while (!s.empty() && isspace((unsigned char)s.back())) s.pop_back();
    return s;
  }
  static Space space_of(const std::string& d) {
    if (d == ".global") return Space::Global;
    if (d == ".const") return Space::Const;
    if (d == ".shared") return Space::Shared;
    if (d == ".local") return Space::Local;
    if (d == ".param") return Space::Param;
    return Space::None;
  }
  u64 integer() {
    skip_space();
    bool minus = accept('-');
    size_t start = at_;
    while (at_ < text_.size() && (isalnum((unsigned char)text_[at_]))) ++at_;
    u64 v = number_bits(text_.substr(start, at_ - start));
    return minus ? (u64) - (s64)v : v;
  }
  static u64 number_bits(std::string t) {
    while (!t.empty() && (t.back() == 'U' || t.back() == 'u')) t.pop_back();
    if (t.size() > 2 && t[0] == '0' && (t[1] == 'b' || t[1] == 'B')) return std::strtoull(t.c_str() + 2, nullptr, 2);
    return std::strtoull(t.c_str(), nullptr, 0);
  }

  // After the space directive: [.align n] [.ptr ...] .type name[dims] [= init] {, name...} [;]
  int parse_variable(Space space, bool in_list = false) {
    Variable v;
    v.space = space;
    u32 vector_length = 1;
    for (;;) {
      if (peek() != '.') break;
      std::string d = word();
      if (d == ".align")
        v.align = (u32)integer();
      else if (d == ".ptr" || d == ".attribute" || d == ".managed" || d == ".unified") {
        if (peek() == '(') skip_past(')');
      } else if (d == ".global" || d == ".shared" || d == ".const" || d == ".local" || d == ".generic" || d == ".param") {
      } else if (d == ".v2" || d == ".v4" || d == ".v8")
        vector_length = (u32)(d[2] - '0');
      else
        v.element_type = d.substr(1);
    }
    u64 element = type_bytes(v.element_type) * vector_length;
    if (v.element_type == "pred") element = 1;
    int last = -1;
    for (;;) {
      Variable one = v;
      one.name = word();
      one.bytes = element;
      one.align = std::max<u32>(v.align, (u32)std::min<u64>(element, 16));
      bool first_dimension = true;
      while (accept('[')) {
        u64 n = peek() == ']' ? 0 : integer();
        if (first_dimension && n == 0) one.unsized = true;
        one.bytes *= n;
        first_dimension = false;
        expect(']');
      }
      if (accept('=')) parse_initialiser(one, (u32)(element / vector_length));
      if (one.unsized && !one.initial.empty()) {
        one.bytes = one.initial.size();
        one.unsized = false;
      }
      one.function = function_ ? function_index_ : -1;
      last = (int)module_.variables.size();
      scopes_.back().variables[one.name] = last;
      if (!function_) module_.variable_by_name[one.name] = last;
      module_.variables.push_back(std::move(one));
      if (in_list || !accept(',')) break;
    }
    if (!in_list) accept(';');
    return last;
  }
  void append_value(Variable& v, u64 bits, u32 element) {
    for (u32 i = 0; i < element; ++i) v.initial.push_back((u8)(bits >> (8 * i)));
  }
  void parse_initialiser(Variable& v, u32 element) {
    if (accept('{')) {
      if (accept('}')) return;
      do {
        parse_initialiser(v, element);
      } while (accept(','));
      expect('}');
      return;
    }
    if (peek() == '"') {
      ++at_;
      while (at_ < text_.size() && text_[at_] != '"') v.initial.push_back((u8)text_[at_++]);
      ++at_;
      v.initial.push_back(0);
      return;
    }
    if (peek() == '-' || isdigit((unsigned char)peek())) {
      Operand o = parse_number();
      u64 bits = o.bits;
      if (o.kind == Operand::Float64 && element == 4) bits = bit_cast<u32>((f32)bit_cast<f64>(o.bits));
      append_value(v, bits, element);
      return;
    }
    std::string name = word();
    if (name == "generic" && accept('(')) {
      name = word();
      expect(')');
    }
    s64 offset = 0;
    if (accept('+')) offset = (s64)integer();
    v.addresses.push_back({v.initial.size(), name, offset});
    append_value(v, 0, element);
  }

  void parse_function(bool is_kernel) {
    auto owned = std::make_unique<Function>();
    Function* f = owned.get();
    f->is_kernel = is_kernel;
    function_ = f;
    function_index_ = (int)module_.functions.size();
    Scope scope;
    scope.id = 0;
    scopes_.push_back(std::move(scope));
    if (!is_kernel && accept('(')) parse_parameter_list(f->results);
    f->name = word();
    if (accept('(')) parse_parameter_list(f->params);
    for (;;) {
      char c = peek();
      if (c == '{' || c == ';') break;
      if (c != '.') fail("unexpected text in a function header");
      std::string d = word();
      if (d == ".reqntid" || d == ".maxntid") {
        for (int i = 0; i < 3; ++i) {
          int n = (int)integer();
          if (d == ".reqntid") f->required_threads[i] = n;
          if (!accept(',')) break;
        }
      } else if (d == ".pragma" || d == ".abi_preserve" || d == ".language")
        skip_past(';');
      else
        while (peek() != '.' && peek() != '{' && peek() != ';') ++at_;
    }
    if (accept('{')) {
      f->defined = true;
      parse_block();
    } else
      expect(';');
    scopes_.pop_back();
    function_ = nullptr;
    auto known = module_.function_by_name.find(f->name);
    if (known == module_.function_by_name.end()) {
      module_.function_by_name[f->name] = function_index_;
    } else if (f->defined)
      known->second = function_index_;
    module_.functions.push_back(std::move(owned));
    function_index_ = -1;
  }
  void parse_parameter_list(std::vector<int>& list) {
    if (accept(')')) return;
    do {
      std::string d = word();
      if (d == ".param")
        list.push_back(parse_variable(Space::Param, true));
      else if (d == ".reg")
        fail("register parameters are not supported");
      else
        fail("expected .param");
    } while (accept(','));
    expect(')');
  }
  void declare_registers() {
    std::string type = word().substr(1);
    if (type == "v2" || type == "v4") fail("vector registers are not supported");
    u32 bytes = type_bytes(type);
    do {
      std::string name = word();
      if (accept('<')) {
        u64 n = integer();
        expect('>');
        for (u64 i = 0; i < n; ++i) add_register(name + std::to_string(i), bytes);
      } else
        add_register(name, bytes);
    } while (accept(','));
    expect(';');
  }
  void add_register(const std::string& name, u32 bytes) {
    scopes_.back().registers[name] = (int)function_->register_bytes.size();
    function_->register_bytes.push_back(bytes);
    function_->register_names.push_back(name);
  }

  void parse_block() {
    push_scope();
    int scope_id = scopes_.back().id;
    for (;;) {
      char c = peek();
      if (c == '\0') fail("missing '}'");
      if (c == '}') {
        ++at_;
        break;
      }
      if (c == '{') {
        ++at_;
        parse_block();
        continue;
      }
      if (c == ';') {
        ++at_;
        continue;
      }
      if (c == '.') {
        std::string d = word();
        if (d == ".reg")
          declare_registers();
        else if (d == ".loc" || d == ".file")
          skip_line();
        else if (space_of(d) != Space::None)
          parse_variable(space_of(d));
        else
          skip_past(';');
        continue;
      }
      Statement st;
      st.line = line_;
      st.scope = scope_id;
      if (accept('@')) {
        st.guard_negated = accept('!');
        std::string n = word();
        st.guard = find_register(n);
        if (st.guard < 0) fail("unknown guard predicate " + n);
      } else {
        size_t back = at_;
        int back_line = line_;
        std::string n = word();
        if (!n.empty() && peek() == ':' && text_[at_ + 1] != ':') {
          ++at_;
          size_t after_label = at_;
          int after_line = line_;
          if (peek() == '.') {
            std::string d = word();
            if (d == ".branchtargets") {
              parse_branch_targets(n, scope_id);
              continue;
            }
            if (d == ".callprototype" || d == ".calltargets") {
              skip_past(';');
              continue;
            }
            at_ = after_label;
            line_ = after_line;
          }
          function_->labels.push_back({n, scope_id, (int)function_->statements.size()});
          continue;
        }
        at_ = back;
        line_ = back_line;
      }
      st.text = opcode_word();
      if (st.text.empty()) fail("expected an instruction");
      split_opcode(st);
      while (peek() != ';') {
        st.operands.push_back(parse_operand());
        if (!accept(',')) {
          if (peek() != ';') {
            if (peek() == '\0') fail("missing ';'");
            st.operands.push_back(parse_operand());
            accept(',');
          }
        }
      }
      expect(';');
      function_->statements.push_back(std::move(st));
    }
    scopes_.pop_back();
  }
  static void split_opcode(Statement& st) {
    size_t start = 0;
    while (start <= st.text.size()) {
      size_t dot = st.text.find('.', start);
      if (dot == std::string::npos) dot = st.text.size();
      st.opcode.push_back(st.text.substr(start, dot - start));
      start = dot + 1;
    }
  }
  void parse_branch_targets(const std::string& name, int scope) {
    BranchTargets b{name, scope, {}};
    do {
      b.labels.push_back(word());
    } while (accept(','));
    expect(';');
    function_->branch_targets.push_back(std::move(b));
  }
  Operand parse_number() {
    Operand o;
    bool minus = accept('-');
    skip_space();
    size_t start = at_;
    bool hex = text_[at_] == '0' && at_ + 1 < text_.size() && strchr("xXfFdD", text_[at_ + 1]);
    while (at_ < text_.size()) {
      char c = text_[at_];
      if (isalnum((unsigned char)c) || c == '.')
        ++at_;
      else if (!hex && (c == '+' || c == '-') && (text_[at_ - 1] == 'e' || text_[at_ - 1] == 'E'))
        ++at_;
      else
        break;
    }
    std::string t = text_.substr(start, at_ - start);
    if (t.size() == 10 && (t[1] == 'f' || t[1] == 'F')) {
      o.kind = Operand::Float32;
      o.bits = std::strtoull(t.c_str() + 2, nullptr, 16) ^ (minus ? 0x80000000ull : 0);
    } else if (t.size() == 18 && (t[1] == 'd' || t[1] == 'D')) {
      o.kind = Operand::Float64;
      o.bits = std::strtoull(t.c_str() + 2, nullptr, 16) ^ (minus ? 0x8000000000000000ull : 0);
    } else if (!hex && t.find_first_of(".eE") != std::string::npos) {
      o.kind = Operand::Float64;
      f64 v = std::strtod(t.c_str(), nullptr);
      o.bits = bit_cast<u64>(minus ? -v : v);
    } else {
      o.kind = Operand::Integer;
      u64 v = number_bits(t);
      o.bits = minus ? (u64) - (s64)v : v;
    }
    return o;
  }
  Operand parse_operand() {
    Operand o;
    char c = peek();
    if (c == '{' || c == '(') {
      ++at_;
      char close = c == '{' ? '}' : ')';
      o.kind = c == '{' ? Operand::Vector : Operand::List;
      while (!accept(close)) {
        o.items.push_back(parse_operand());
        if (!accept(',') && peek() != close) fail("malformed operand list");
      }
      return o;
    }
    if (c == '[') {
      ++at_;
      o.kind = Operand::Address;
      o.items.push_back(parse_operand());
      for (;;) {
        if (accept('+'))
          o.offset += (s64)integer();
        else if (peek() == '-')
          o.offset += (s64)integer();
        else if (accept(','))
          o.items.push_back(parse_operand());
        else
          break;
      }
      expect(']');
      return o;
    }
    if (c == '!') {
      ++at_;
      o = parse_operand();
      o.negated = true;
      return o;
    }
    if (c == '-' || isdigit((unsigned char)c)) return parse_number();
    if (c == '"') {
      ++at_;
      skip_past('"');
      o.kind = Operand::Name;
      return o;
    }
    std::string n = word();
    if (n.empty()) fail("malformed operand");
    if (n == "_") {
      o.kind = Operand::Sink;
    } else if (n == "WARP_SZ") {
      o.kind = Operand::Integer;
      o.bits = 32;
    } else {
      int r = find_register(n);
      if (r >= 0) {
        o.kind = Operand::Register;
        o.index = r;
      } else if (n[0] == '%') {
        while (at_ < text_.size() && text_[at_] == '.') {
          size_t s = at_++;
          while (at_ < text_.size() && name_char(text_[at_])) ++at_;
          n += text_.substr(s, at_ - s);
        }
        o.kind = Operand::Special;
        o.name = n;
      } else {
        int v = find_variable(n);
        if (v >= 0) {
          o.kind = Operand::Variable;
          o.index = v;
          o.name = n;
        } else {
          o.kind = Operand::Name;
          o.name = n;
        }
      }
    }
    if (peek() == '|') {
      ++at_;
      Operand pair;
      pair.kind = Operand::Pair;
      pair.items.push_back(o);
      pair.items.push_back(parse_operand());
      return pair;
    }
    // "symbol+4" as a mov source; inside an address the caller handles it
    return o;
  }
};
