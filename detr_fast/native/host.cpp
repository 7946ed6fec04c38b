// What the host does for a call that was made before, without Python: one look into a table, allocations, launches, and one
// node of autograd's. Which instructions those are, Python writes down (`ops.host_program`, `ops.host_native`).
//
// Decisions  call -> any object: what the dispatcher chose for calls like it.
// Repeated   call -> what its program gives; a call without one yet (see `kPrice`), or one that somebody looks at, goes to Python.
// Program    instructions over registers, the forward's and, by which outputs a gradient arrives for, the backward's.
//
// "Like it" is a key: all that a program or a decision depends on, of the arguments and of PyTorch's state (see `Key`).
// Every function but `HostNode`'s runs with the GIL held, which is what guards the tables.
//
// objects.h, key.h and program.h are parts of this file.

#include "program.h"

#include <structmember.h>

#include <array>

namespace host {

struct Decisions {
  Table table;
  size_t limit = 0;
  int64_t of = generation;
};

// What a decision is made under besides its call: another number when that has changed.
int64_t stamp() { return generation << 24 | requests; }

// get(*arguments): what was put for such a call, or None.
PyObject* decisions_get(PyObject* self, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  auto& decisions = held<Decisions>(self);
  static thread_local Key key;
  tidy(decisions.table, decisions.of);  // ahead of the key: what goes may run Python
  if (settings == nullptr || followed() || PyList_GET_SIZE(settings->recorders.get()) > 0 ||
      !key.read(arguments, count, -1)) {
    Py_RETURN_NONE;
  }
  const auto found = decisions.table.find(key.words());
  PyObject* value = found == decisions.table.end() ? Py_None : found->second.get();
  return Object::borrowed(value).release();
  END_HANDLE_TH_ERRORS
}

// put(value, stamp, *arguments): dropped where the stamp is no longer what it was when the decision was made.
PyObject* decisions_put(PyObject* self, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  auto& decisions = held<Decisions>(self);
  Key key;
  tidy(decisions.table, decisions.of);
  if (count > 2 && settings != nullptr && !followed() && key.read(arguments + 2, count - 2, -1) &&
      integer(arguments[1]) == stamp()) {
    keep(decisions.table, decisions.limit, key.words(), Object::borrowed(arguments[0]));
  }
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

PyObject* decisions_clear(PyObject* self, PyObject*) {
  HANDLE_TH_ERRORS
  ++generation;  // what is being decided now is not to be put any more
  auto& decisions = held<Decisions>(self);
  tidy(decisions.table, decisions.of);
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

// Decisions(limit)
PyObject* decisions_new(PyTypeObject* type, PyObject* arguments, PyObject*) {
  HANDLE_TH_ERRORS
  auto made = std::make_unique<Decisions>();
  made->limit = integer(item(arguments, 0));
  return new_holder(type, std::move(made));
  END_HANDLE_TH_ERRORS
}

// To record a call takes the host about as long as so many calls save by its program. Each recording takes that from what an op may
// spend, each call of a program gives one back. Where that is spent, as where shapes vary for ever, only what has been met so often is
// recorded; before, whatever is met again.
constexpr int64_t kPrice = 16, kAllowance = 32 * kPrice;

struct Repeated {
  Table table;  // Programs; how often a call was met that has none yet, negative while it waits, None where there can be none of it
  size_t limit = 0;
  int64_t of = generation;
  int64_t left = kAllowance;
  Py_ssize_t offset = -1;  // the index of the argument that is a seed's offset, or -1
  Object python;           // what runs a call without a program
  Object record;           // (*arguments) -> Program, None, False where it is to be tried again, or minus the calls to wait for that
};

Object program_for(Repeated& repeated, const Key& key, PyObject* const* arguments, Py_ssize_t count) {
  const auto found = repeated.table.find(key.words());
  if (found == repeated.table.end()) {
    keep(repeated.table, repeated.limit, key.words(), Object::stolen(PyLong_FromLong(1)));
    return {};
  }
  if (is_program(found->second.get())) {
    repeated.left = std::min(repeated.left + 1, kAllowance);
    return found->second;
  }
  if (found->second.get() == Py_None) return {};
  Object met = Object::stolen(PyLong_FromLongLong(integer(found->second.get()) + 1));
  if (integer(met.get()) < 1 || (repeated.left < kPrice && integer(met.get()) <= kPrice)) {
    found->second = met;
    return {};
  }
  found->second = Object::borrowed(Py_None);  // until it is recorded, which calls this again
  const Words words = key.words();
  const auto of = generation;
  Object recorded = Object::stolen(PyObject_Vectorcall(repeated.record.get(), arguments, count, nullptr));
  const bool later = recorded.get() == Py_False;
  if (!later && !PyLong_CheckExact(recorded.get())) repeated.left = std::max<int64_t>(repeated.left - kPrice, 0);
  if (of == generation) keep(repeated.table, repeated.limit, words, later ? met : recorded);
  return is_program(recorded.get()) ? recorded : Object();
}

// The tensors that an argument is, or holds, in their order.
void add_tensors(std::vector<Tensor>& tensors, PyObject* argument) {
  if (THPVariable_CheckExact(argument)) {
    tensors.push_back(THPVariable_Unpack(argument));
  } else if (PyList_CheckExact(argument) || PyTuple_Check(argument)) {
    for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(argument); ++i) {
      add_tensors(tensors, PySequence_Fast_GET_ITEM(argument, i));
    }
  }
}

PyObject* repeated_call(PyObject* self, PyObject* const* arguments, size_t flags, PyObject* names) {
  HANDLE_TH_ERRORS
  auto& repeated = held<Repeated>(self);
  const auto count = PyVectorcall_NARGS(flags);
  static thread_local Key key;
  if (repeated.of != generation) repeated.left = kAllowance;
  tidy(repeated.table, repeated.of);  // ahead of the key: what goes may run Python
  if (settings != nullptr && names == nullptr && !seen() && key.read(arguments, count, repeated.offset) &&
      !key.captured() && on_current_device(key.device().is_cuda() ? key.device().index() : -1)) {
    if (const Object found = program_for(repeated, key, arguments, count)) {
      std::vector<Tensor> inputs;
      inputs.reserve(held<Program>(found.get()).forward.given.size());
      int64_t offset = 0;
      for (Py_ssize_t i = 0; i < count; ++i) {
        if (i == repeated.offset) {
          offset = integer(arguments[i]);
        } else {
          add_tensors(inputs, arguments[i]);
        }
      }
      return run(found, inputs, offset, Object::borrowed(Py_None));
    }
  }
  return PyObject_Vectorcall(repeated.python.get(), arguments, count, names);
  END_HANDLE_TH_ERRORS
}

// programs(): what is known: a list of Programs, numbers and None.
PyObject* repeated_programs(PyObject* self, PyObject*) {
  HANDLE_TH_ERRORS
  auto& repeated = held<Repeated>(self);
  tidy(repeated.table, repeated.of);
  Object list = Object::stolen(PyList_New(0));
  for (const auto& one : repeated.table) {
    if (PyList_Append(list.get(), one.second.get()) < 0) throw python_error();
  }
  return list.release();
  END_HANDLE_TH_ERRORS
}

// Repeated(python, record, offset, limit)
PyObject* repeated_new(PyTypeObject* type, PyObject* arguments, PyObject*) {
  HANDLE_TH_ERRORS
  auto made = std::make_unique<Repeated>();
  made->python = Object::borrowed(item(arguments, 0));
  made->record = Object::borrowed(item(arguments, 1));
  made->offset = integer(item(arguments, 2));
  made->limit = integer(item(arguments, 3));
  return new_holder(type, std::move(made), repeated_call);
  END_HANDLE_TH_ERRORS
}

// ---------------------------------------------------------------------------------------------------------------------
// The module.

// configure(observers, recorders, launch, empty, hooks, capturing, default_device)
PyObject* configure(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(
      count == 7 && PyList_CheckExact(arguments[0]) && PyList_CheckExact(arguments[1]) && PyDict_CheckExact(arguments[2]),
      "configure takes two lists, a dict and four objects");
  static auto& all = *new Settings();  // for good: what a process leaves behind is destroyed without Python
  Object* places[] = {&all.observers, &all.recorders, &all.launch, &all.empty, &all.hooks, &all.capturing, &all.default_device};
  for (size_t i = 0; i < 7; ++i) *places[i] = arguments[i] == Py_None ? Object() : Object::borrowed(arguments[i]);
  settings = &all;
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

PyObject* set_requests(PyObject*, PyObject* number) {
  HANDLE_TH_ERRORS
  requests = integer(number);
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

// unchanged(places, found, parts, kinds, hooks): whether each place (dict, name) still holds the object of the id that was found there, or
// None where nothing is, each part, a weak reference, is still of its kind, and the dicts at the hooks' places are empty. All are lists.
PyObject* unchanged(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 5 && std::all_of(arguments, arguments + 5, [](PyObject* one) { return PyList_CheckExact(one); }),
      "unchanged takes five lists");
  const auto at = [](PyObject* pair) {
    PyObject* found = PyDict_GetItemWithError(item(pair, 0), item(pair, 1));
    if (found == nullptr && PyErr_Occurred()) throw python_error();
    return found == nullptr ? Py_None : found;
  };
  auto [places, found, parts, kinds, hooks] = std::array{arguments[0], arguments[1], arguments[2], arguments[3], arguments[4]};
  bool same = PyList_GET_SIZE(places) == PyList_GET_SIZE(found) && PyList_GET_SIZE(parts) == PyList_GET_SIZE(kinds);
  for (Py_ssize_t i = 0; same && i < PyList_GET_SIZE(places); ++i) {
    same = reinterpret_cast<intptr_t>(at(PyList_GET_ITEM(places, i))) == integer(PyList_GET_ITEM(found, i));
  }
  for (Py_ssize_t i = 0; same && i < PyList_GET_SIZE(parts); ++i) {
    const Object part = Object::stolen(PyObject_CallNoArgs(PyList_GET_ITEM(parts, i)));
    same = reinterpret_cast<PyObject*>(Py_TYPE(part.get())) == PyList_GET_ITEM(kinds, i);
  }
  for (Py_ssize_t i = 0; same && i < PyList_GET_SIZE(hooks); ++i) {
    const int some = PyObject_IsTrue(at(PyList_GET_ITEM(hooks, i)));
    if (some < 0) throw python_error();
    same = some == 0;
  }
  return PyBool_FromLong(same);
  END_HANDLE_TH_ERRORS
}

// Whether a tensor has hooks of this kind; none may be an empty dict, too.
bool some(PyObject* hooks) { return hooks != nullptr && hooks != Py_None && !(PyDict_Check(hooks) && PyDict_GET_SIZE(hooks) == 0); }

// untouched(dicts, entries, objects, kinds, tensors, facts): whether each dict still holds just its entries, [key, value, ...] in their order, each
// object is still of its kind, and each tensor has no hooks and is what its facts say, [address, elements, whether it wants a gradient, ...]. All are lists.
PyObject* untouched(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 6 && std::all_of(arguments, arguments + 6, [](PyObject* one) { return PyList_CheckExact(one); }),
      "untouched takes six lists");
  auto [dicts, entries, objects, kinds, tensors, facts] =
      std::array{arguments[0], arguments[1], arguments[2], arguments[3], arguments[4], arguments[5]};
  bool same = PyList_GET_SIZE(dicts) == PyList_GET_SIZE(entries) && PyList_GET_SIZE(objects) == PyList_GET_SIZE(kinds) &&
      3 * PyList_GET_SIZE(tensors) == PyList_GET_SIZE(facts);
  for (Py_ssize_t i = 0; same && i < PyList_GET_SIZE(objects); ++i) {
    same = reinterpret_cast<PyObject*>(Py_TYPE(PyList_GET_ITEM(objects, i))) == PyList_GET_ITEM(kinds, i);
  }
  for (Py_ssize_t i = 0; same && i < PyList_GET_SIZE(dicts); ++i) {
    PyObject *dict = PyList_GET_ITEM(dicts, i), *held = PyList_GET_ITEM(entries, i), *key = nullptr, *value = nullptr;
    TORCH_CHECK_TYPE(PyDict_Check(dict) && PyList_CheckExact(held), "untouched takes dicts, and a list of entries for each");
    same = 2 * PyDict_GET_SIZE(dict) == PyList_GET_SIZE(held);
    for (Py_ssize_t place = 0, j = 0; same && PyDict_Next(dict, &place, &key, &value); j += 2) {
      same = key == PyList_GET_ITEM(held, j) && value == PyList_GET_ITEM(held, j + 1);
    }
  }
  for (Py_ssize_t i = 0; same && i < PyList_GET_SIZE(tensors); ++i) {
    PyObject* one = PyList_GET_ITEM(tensors, i);
    TORCH_CHECK_TYPE(THPVariable_Check(one), "untouched takes tensors");
    const auto* variable = reinterpret_cast<THPVariable*>(one);
    const Tensor& tensor = THPVariable_Unpack(one);
    same = !some(variable->backward_hooks) && !some(variable->post_accumulate_grad_hooks) &&
        reinterpret_cast<intptr_t>(tensor.data_ptr()) == integer(PyList_GET_ITEM(facts, 3 * i)) &&
        tensor.numel() == integer(PyList_GET_ITEM(facts, 3 * i + 1)) &&
        tensor.requires_grad() == (integer(PyList_GET_ITEM(facts, 3 * i + 2)) != 0);
  }
  return PyBool_FromLong(same);
  END_HANDLE_TH_ERRORS
}

PyObject* current_stamp(PyObject*, PyObject*) { return PyLong_FromLongLong(stamp()); }

PyObject* forget(PyObject*, PyObject*) {
  ++generation;
  Py_RETURN_NONE;
}

template <class Function>
PyCFunction as_method(Function function) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

PyMethodDef program_methods[] = {{"run", as_method(program_run), METH_FASTCALL, "run(offset, extra, *inputs)"}, {}};
PyMethodDef decisions_methods[] = {
    {"get", as_method(decisions_get), METH_FASTCALL, "get(*arguments): what was put for such a call, or None"},
    {"put", as_method(decisions_put), METH_FASTCALL, "put(value, stamp, *arguments)"},
    {"clear", decisions_clear, METH_NOARGS, "clear()"},
    {}};
PyMethodDef repeated_methods[] = {
    {"programs", repeated_programs, METH_NOARGS, "programs(): Programs, a number for calls met so often without one, None where there is none"},
    {}};
PyMemberDef repeated_members[] = {
    {"__vectorcalloffset__", T_PYSSIZET, offsetof(Holder<Repeated>, vectorcall), READONLY, nullptr}, {}};
PyMethodDef functions[] = {
    {"configure", as_method(configure), METH_FASTCALL, "configure(observers, recorders, launch, empty, hooks, capturing, default_device)"},
    {"set_requests", set_requests, METH_O, "set_requests(number)"},
    {"unchanged", as_method(unchanged), METH_FASTCALL, "unchanged(places, found, parts, kinds, hooks)"},
    {"untouched", as_method(untouched), METH_FASTCALL, "untouched(dicts, entries, objects, kinds, tensors, facts)"},
    {"stamp", current_stamp, METH_NOARGS, "stamp(): what decisions are made under, for `put`"},
    {"forget", forget, METH_NOARGS, "forget(): drop all that tables hold"},
    {}};

PyType_Slot program_slots[] = {
    {Py_tp_new, reinterpret_cast<void*>(program_new)},
    {Py_tp_dealloc, reinterpret_cast<void*>(free_holder<Program>)},
    {Py_tp_methods, program_methods},
    {0, nullptr}};
PyType_Slot decisions_slots[] = {
    {Py_tp_new, reinterpret_cast<void*>(decisions_new)},
    {Py_tp_dealloc, reinterpret_cast<void*>(free_holder<Decisions>)},
    {Py_tp_methods, decisions_methods},
    {0, nullptr}};
PyType_Slot repeated_slots[] = {
    {Py_tp_new, reinterpret_cast<void*>(repeated_new)},
    {Py_tp_dealloc, reinterpret_cast<void*>(free_holder<Repeated>)},
    {Py_tp_call, reinterpret_cast<void*>(PyVectorcall_Call)},
    {Py_tp_methods, repeated_methods},
    {Py_tp_members, repeated_members},
    {0, nullptr}};

PyType_Spec program_spec = {"detr_fast.native.Program", sizeof(Holder<Program>), 0, Py_TPFLAGS_DEFAULT, program_slots};
PyType_Spec decisions_spec = {"detr_fast.native.Decisions", sizeof(Holder<Decisions>), 0, Py_TPFLAGS_DEFAULT, decisions_slots};
PyType_Spec repeated_spec = {
    "detr_fast.native.Repeated", sizeof(Holder<Repeated>), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_VECTORCALL, repeated_slots};

PyModuleDef module_definition = {PyModuleDef_HEAD_INIT, "_host", nullptr, -1, functions};

}  // namespace host

PyMODINIT_FUNC PyInit__host() {
  using namespace host;
  PyObject* module = PyModule_Create(&module_definition);
  if (module == nullptr) return nullptr;
  for (auto [name, spec] : {std::pair{"Program", &program_spec}, {"Decisions", &decisions_spec}, {"Repeated", &repeated_spec}}) {
    PyObject* type = PyType_FromSpec(spec);
    if (type == nullptr || PyModule_AddObjectRef(module, name, type) < 0) return nullptr;
    if (spec == &program_spec) program_type = reinterpret_cast<PyTypeObject*>(type);
  }
  return module;
}
