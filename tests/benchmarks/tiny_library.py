"""A hand-written Liberty library of six cells with round numbers."""

_HEADER = """
library (tiny) {
  /* units that differ from the reader's, which are ns, fF, fJ and nW */
  time_unit : "1ps"; voltage_unit : "1V"; leakage_power_unit : "1uW";
  capacitive_load_unit (1, pf);
  revision : "7";
  input_threshold_pct_rise : 50; input_threshold_pct_fall : 50;
  output_threshold_pct_rise : 50; output_threshold_pct_fall : 50;
  slew_lower_threshold_pct_rise : 30; slew_lower_threshold_pct_fall : 30;
  slew_upper_threshold_pct_rise : 70; slew_upper_threshold_pct_fall : 70;
  operating_conditions (typical) { voltage : 1.00; }
  lu_table_template (delay) {
    variable_1 : input_net_transition; variable_2 : total_output_net_capacitance;
    index_1 ("0, 100"); index_2 ("0, 0.010");
  }
  power_lut_template (energy) {
    variable_1 : total_output_net_capacitance; variable_2 : input_transition_time;
    index_1 ("0, 0.010"); index_2 ("0, 100");
  }
  power_lut_template (hidden) { variable_1 : input_transition_time; index_1 ("0, 100"); }
  lu_table_template (setup) {
    variable_1 : constrained_pin_transition; variable_2 : related_pin_transition;
    index_1 ("0, 100"); index_2 ("0, 100");
  }
"""

# 10 ps and 1 ps for every fF; slews of 2 ps for every fF.
_TABLES = """
        cell_rise (delay) { values ("10, 20", "10, 20"); }
        cell_fall (delay) { values ("10, 20", \\
                                    "10, 20"); }
        rise_transition (delay) { values ("0, 20", "0, 20"); }
        fall_transition (delay) { values ("0, 20", "0, 20"); }"""


def _input(name: str, more: str = "") -> str:
    return f'    pin ("{name}") {{ direction : input; capacitance : 0.002; {more} }}\n'


def _gate(name: str, function: str, inputs: str, area: float) -> str:
    arcs = "".join(
        f"""      timing () {{ related_pin : "{pin}"; timing_sense : negative_unate;{_TABLES} }}
      internal_power () {{ related_pin : "{pin}"; rise_power (scalar) {{ values ("0.003"); }}
        fall_power (energy) {{ values ("0.001, 0.001", "0.002, 0.002"); }} }}
"""
        for pin in inputs
    )
    pins = "".join(_input(pin) for pin in inputs)
    return f"""  cell ({name}) {{
    area : {area}; cell_leakage_power : 0.001;
{pins}    pin (Y) {{ direction : output; max_capacitance : 0.1; function : "{function}";
{arcs}    }}
  }}
"""


_FLIP_FLOP = f"""  cell (DFF) {{
    area : 5.0; cell_leakage_power : 0.004;
    leakage_power () {{ when : "Q"; value : 0.006; }}
    leakage_power () {{ when : "!Q"; value : 0.002; }}
    ff (IQ, IQN) {{ clocked_on : "CK"; next_state : "D"; }}
{
    _input(
        "D",
        '''timing () { related_pin : "CK"; timing_type : setup_rising;
      rise_constraint (setup) { values ("30, 30", "30, 30"); }
      fall_constraint (setup) { values ("30, 30", "30, 30"); } }''',
    )
}
{
    _input(
        "CK",
        '''clock : true;
      internal_power () { when : "D & Q"; rise_power (scalar) { values ("0.001"); }
        fall_power (scalar) { values ("0.001"); } }
      internal_power () { when : "D & !Q"; rise_power (scalar) { values ("0.005"); }
        fall_power (scalar) { values ("0.0"); } }''',
    )
}
    pin (Q) {{ direction : output; max_capacitance : 0.1; function : "IQ";
      timing () {{ related_pin : "CK"; timing_type : rising_edge; timing_sense : non_unate;{
    _TABLES
} }}
    }}
  }}
"""


def _clock_gate(drive: int) -> str:
    return f"""  cell (ICG_X{drive}) {{
    area : {3.0 + drive}; cell_leakage_power : 0.001; clock_gating_integrated_cell : latch_posedge;
{_input("CK", "clock_gate_clock_pin : true;")}{_input("E", "clock_gate_enable_pin : true;")}
    pin (GCK) {{ direction : output; clock_gate_out_pin : true;
      max_capacitance : {0.005 * drive}; state_function : "CK & IQ"; }}
  }}
"""


TINY = (
    _HEADER
    + _gate("INV", "!A", "A", 1.0)
    + _gate("BUF", "A", "A", 1.5).replace("negative_unate", "positive_unate")
    + _gate("NAND2", "!(A & B)", "AB", 1.5)
    + _gate("NOR2", "(A + B)'", "AB", 1.5)
    + _FLIP_FLOP
    + _clock_gate(1)
    + _clock_gate(4)
    + "}\n"
)
