// The group-PE array behind AXI4-Streams, for FPGAs and for systems that cannot promise a beat a cycle.
//
// One fold after the other:
//   s_axis_activations  ROWS beats, row ROWS-1's first: GROUP activations of every column
//   s_axis_slots        one slot of every row a beat, {valid, sign, exponent, index} as in
//                       wire_slots.hex, row 0 lowest; tuser marks a filter's last slot, tlast the
//                       fold's last slot
//   s_axis_sums         a beat a filter, which the columns' sums start from: zero, biases, or what
//                       earlier folds along the reduction gave
//   m_axis_sums         a beat a filter; tlast marks the fold's last
// Column c is bits [c*PSUM +: PSUM] of a beat of sums.
//
// The array itself never stalls. A cycle without a beat is an empty slot that ends nothing, which
// changes neither sums nor their order. A filter's last slot is taken only if its first sums are
// there and the output has room for what will come of it.
//
// If nobody waits, a fold takes the array's 2R + C - 2 cycles and its slots, from the first
// activations to the last sums.
`timescale 1ns / 1ps
module gpe_array_axis #(
    parameter ROWS = 4,
    parameter COLUMNS = 4,
    parameter GROUP = 8,
    parameter WIDTH = 8,
    parameter PSUM = 32,
    parameter LOG_DEPTH = 4,  // sums of 2^LOG_DEPTH filters may be on their way or wait
    parameter INDEX = $clog2(GROUP),
    parameter EXPONENT = $clog2(WIDTH),
    parameter SLOT_BITS = 2 + EXPONENT + INDEX
) (
    input                             aclk,
    input                             aresetn,

    input  [COLUMNS*GROUP*WIDTH-1:0]  s_axis_activations_tdata,
    input                             s_axis_activations_tvalid,
    output                            s_axis_activations_tready,

    input  [ROWS*SLOT_BITS-1:0]       s_axis_slots_tdata,
    input                             s_axis_slots_tuser,
    input                             s_axis_slots_tlast,
    input                             s_axis_slots_tvalid,
    output                            s_axis_slots_tready,

    input  [COLUMNS*PSUM-1:0]         s_axis_sums_tdata,
    input                             s_axis_sums_tvalid,
    output                            s_axis_sums_tready,

    output [COLUMNS*PSUM-1:0]         m_axis_sums_tdata,
    output                            m_axis_sums_tlast,
    output                            m_axis_sums_tvalid,
    input                             m_axis_sums_tready
);
    localparam DEPTH = 1 << LOG_DEPTH;
    // From the fold's last slot in row 0 to the last element's use of its activations.
    localparam DRAIN = ROWS + COLUMNS - 2;
    localparam COUNT = $clog2(ROWS + COLUMNS + 1);

    wire reset = ~aresetn;

    // ---- A fold: load ROWS rows, stream slots to the one with tlast, let them pass the array.
    localparam LOADING = 2'd0, STREAMING = 2'd1, DRAINING = 2'd2;
    reg [1:0]       state;
    reg [COUNT-1:0] count;

    wire load, slot, ends, fold_ends;
    assign s_axis_activations_tready = state == LOADING;
    assign load = s_axis_activations_tready & s_axis_activations_tvalid;

    reg  [LOG_DEPTH:0] pending;  // filters whose sums were begun and have not left
    wire room = pending != DEPTH;
    assign s_axis_slots_tready =
        state == STREAMING & (~s_axis_slots_tuser | (s_axis_sums_tvalid & room));
    assign slot = s_axis_slots_tready & s_axis_slots_tvalid;
    assign ends = slot & s_axis_slots_tuser;
    assign fold_ends = slot & s_axis_slots_tlast;
    assign s_axis_sums_tready = ends;

    always @(posedge aclk) begin
        if (reset) begin
            state <= LOADING;
            count <= 0;
        end else case (state)
            LOADING: if (load) begin
                count <= count == ROWS - 1 ? 0 : count + 1;
                if (count == ROWS - 1) state <= STREAMING;
            end
            STREAMING: if (fold_ends) state <= DRAIN == 0 ? LOADING : DRAINING;
            default: begin
                count <= count == DRAIN - 1 ? 0 : count + 1;
                if (count == DRAIN - 1) state <= LOADING;
            end
        endcase
    end

    // ---- Skew at the edges: row r is r cycles behind row 0, column c's first sums c cycles behind
    // column 0's.
    wire [ROWS-1:0]          valid_in, sign_in, last_in;
    wire [ROWS*EXPONENT-1:0] exponent_in;
    wire [ROWS*INDEX-1:0]    index_in;
    wire [COLUMNS*PSUM-1:0]  psum_in, psum;
    wire [COLUMNS-1:0]       psum_take, psum_done;

    genvar r, c;
    generate
        for (r = 0; r < ROWS; r = r + 1) begin : row
            wire [SLOT_BITS-1:0] now = s_axis_slots_tdata[r*SLOT_BITS +: SLOT_BITS];
            wire [SLOT_BITS:0]   word;
            axis_delay #(.BITS(SLOT_BITS + 1), .CYCLES(r)) skew (
                .clock(aclk), .reset(reset),
                .in({ends, now[SLOT_BITS-1] & slot, now[SLOT_BITS-2:0]}), .out(word)
            );
            assign {last_in[r], valid_in[r], sign_in[r]} = word[SLOT_BITS -: 3];
            assign exponent_in[r*EXPONENT +: EXPONENT] = word[INDEX +: EXPONENT];
            assign index_in[r*INDEX +: INDEX] = word[0 +: INDEX];
        end
        for (c = 0; c < COLUMNS; c = c + 1) begin : column
            axis_delay #(.BITS(PSUM), .CYCLES(c)) skew (
                .clock(aclk), .reset(reset),
                .in(s_axis_sums_tdata[c*PSUM +: PSUM]), .out(psum_in[c*PSUM +: PSUM])
            );
        end
    endgenerate

    gpe_array #(
        .ROWS(ROWS), .COLUMNS(COLUMNS), .GROUP(GROUP), .WIDTH(WIDTH), .PSUM(PSUM)
    ) array (
        .clock(aclk), .reset(reset),
        .load(load), .activations_in(s_axis_activations_tdata),
        .valid_in(valid_in), .sign_in(sign_in), .exponent_in(exponent_in),
        .index_in(index_in), .last_in(last_in),
        .psum_in(psum_in), .psum_take(psum_take), .psum_done(psum_done), .psum(psum)
    );

    // ---- Output: the columns' sums side by side again, then a first-in first-out buffer.
    wire [COLUMNS*PSUM-1:0] aligned;
    generate
        for (c = 0; c < COLUMNS; c = c + 1) begin : out
            axis_delay #(.BITS(PSUM), .CYCLES(COLUMNS - 1 - c)) align (
                .clock(aclk), .reset(reset),
                .in(psum[c*PSUM +: PSUM]), .out(aligned[c*PSUM +: PSUM])
            );
        end
    endgenerate

    reg                    push;  // the last column's sum is in its register
    reg [COLUMNS*PSUM-1:0] sums [0:DEPTH-1];
    reg                    lasts [0:DEPTH-1];
    reg [LOG_DEPTH:0]      begun, written, read;  // filters, modulo twice the depth
    wire pop = m_axis_sums_tvalid & m_axis_sums_tready;

    assign m_axis_sums_tvalid = written != read;
    assign m_axis_sums_tdata = sums[read[LOG_DEPTH-1:0]];
    assign m_axis_sums_tlast = lasts[read[LOG_DEPTH-1:0]];

    always @(posedge aclk) begin
        push <= ~reset & psum_done[COLUMNS-1];
        if (push) sums[written[LOG_DEPTH-1:0]] <= aligned;
        if (ends) lasts[begun[LOG_DEPTH-1:0]] <= s_axis_slots_tlast;
        if (reset) begin
            pending <= 0;
            begun <= 0;
            written <= 0;
            read <= 0;
        end else begin
            pending <= pending + ends - pop;
            begun <= begun + ends;
            written <= written + push;
            read <= read + pop;
        end
    end
endmodule

// A word some cycles later.
module axis_delay #(
    parameter BITS = 1,
    parameter CYCLES = 1
) (
    input             clock,
    input             reset,
    input  [BITS-1:0] in,
    output [BITS-1:0] out
);
    generate
        if (CYCLES == 0) begin : none
            assign out = in;
        end else begin : some
            reg [BITS*CYCLES-1:0] words;
            wire [BITS*(CYCLES+1)-1:0] moved = {words, in};
            always @(posedge clock) words <= reset ? 0 : moved[BITS*CYCLES-1:0];
            assign out = words[BITS*CYCLES-1 -: BITS];
        end
    endgenerate
endmodule
